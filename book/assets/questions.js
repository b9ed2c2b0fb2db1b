// Marks the test of twenty questions: says what is wrong with each wrong choice, the score, and what to read again.
// Scores are kept in the reader's browser, so that the form after the course can be set beside the one before it.
document.querySelectorAll("form.questions").forEach((form) => {
  const sets = [...form.querySelectorAll("fieldset")];
  const key = (name) => `minimoe-questions-${name}`;
  const kept = (name) => {
    try {
      return JSON.parse(localStorage.getItem(key(name)));
    } catch {
      return null;
    }
  };
  const said = document.createElement("p");
  said.setAttribute("role", "status");
  const button = document.createElement("button");
  button.type = "submit";
  button.textContent = "Mark my answers";
  form.append(button, said);
  for (const set of sets) {
    set.querySelector("details").hidden = true;
    set.addEventListener("input", () => {
      set.querySelector("details").hidden = true;
      set.querySelector(".told")?.remove();
    });
  }
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const again = new Map();
    let right = 0;
    for (const set of sets) {
      const chosen = set.querySelector("input:checked");
      const told = document.createElement("p");
      told.className = "told";
      told.textContent = !chosen ? "Not answered." : chosen.dataset.wrong ? `Not right. ${chosen.dataset.wrong}` : "Right.";
      set.querySelector(".told")?.remove();
      set.insertBefore(told, set.querySelector("details"));
      set.querySelector("details").hidden = false;
      if (chosen && !chosen.dataset.wrong) right += 1;
      else again.set(set.querySelector("a").textContent, set.querySelector("a").href);
    }
    try {
      localStorage.setItem(key(form.dataset.form), JSON.stringify(right));
    } catch {
      // a browser that keeps nothing still marks
    }
    said.replaceChildren(`${right} of ${sets.length} right.`);
    const before = form.dataset.form === "b" ? kept("a") : null;
    if (before !== null && before < sets.length) {
      const gain = Math.round((100 * (right - before)) / (sets.length - before));
      said.append(` Before the course it was ${before}: you have learned ${gain} % of what there was to learn.`);
    }
    if (again.size) said.append(" To read again: ");
    [...again].forEach(([name, href], i) => {
      const link = document.createElement("a");
      link.href = href;
      link.textContent = name;
      said.append(i ? ", " : "", link);
    });
    if (again.size) said.append(".");
  });
});
