"""Texts to begin with: (name, the domain that it is nearest to, text)."""

EXAMPLES = (
    (
        "Encyclopaedia",
        "wiki_en",
        "The river rises in the northern mountains and flows for 120 kilometres to the sea.",
    ),
    (
        "The same in French",
        "wiki_fr",
        "La rivière prend sa source dans les montagnes du nord et coule sur 120 kilomètres jusqu'à la mer.",
    ),
    (
        "… and in Spanish",
        "wiki_es",
        "El río nace en las montañas del norte y recorre 120 kilómetros hasta el mar.",
    ),
    (
        "A recipe",
        "cooking",
        "Preheat the oven to 180 °C. Mix the flour, the sugar and a pinch of salt, stir in two eggs and the melted "
        "butter, and bake for 35 minutes.",
    ),
    (
        "Code",
        "code",
        "def mean(values):\n    if not values:\n        raise ValueError('mean of nothing')\n"
        "    return sum(values) / len(values)\n",
    ),
    (
        "Mathematics",
        "math",
        ">>> from sympy import diff, sin\n>>> from sympy.abc import x\n>>> diff(sin(x)**2, x)\n2*sin(x)*cos(x)\n",
    ),
    (
        "A play",
        "drama",
        "Enter two Watchmen.\n\nFIRST WATCHMAN\nWho walks so late about the castle wall?\n\n"
        "SECOND WATCHMAN\nA friend, good sir, and cold.\n",
    ),
    (
        "A licence",
        "law",
        "You may copy and distribute the work, with or without changes, provided that this notice stands in every copy "
        "and that no warranty is given.",
    ),
    ("Emoji and Arabic", "", "مرحبا بالعالم! 👩‍🚀 e\u0301 — ∑ x² ≤ 1 \u202e\u0000\n"),
)
