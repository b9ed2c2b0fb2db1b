// Starts each explorable of the page when the reader comes near it. Without this script its static figure stays.
(() => {
  const base = new URL("explorables/", document.currentScript.src);

  async function start(place) {
    const name = place.dataset.explorable;
    const figure = place.querySelector("figure");
    const el = document.createElement("div");
    const given = { data: JSON.parse(place.querySelector("script").textContent), files: new URL(`${name}/`, base).href };
    place.append(el);
    try {
      const { default: widget } = await import(new URL(`${name}.mjs`, base));
      await widget.render({ model: { get: (key) => given[key] }, el });
      if (!el.dataset.failed) figure.remove();
    } catch (error) {
      el.dataset.failed = error.message;
      el.textContent = `This explorable could not be loaded. The figure stands in for it. (${error.message})`;
    }
    place.dataset.state = el.dataset.failed ? "failed" : "ready";
  }

  const seen = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        seen.unobserve(entry.target);
        start(entry.target);
      }
    },
    { rootMargin: "200px" },
  );
  const begin = () => document.querySelectorAll(".minimoe-explorable").forEach((place) => seen.observe(place));
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", begin);
  else begin();
})();
