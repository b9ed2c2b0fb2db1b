// Starts each explorable of the page when the reader comes near it. Without this script its static figure stays.
// All is loaded as classic scripts, which put what they hold into `minimoe`: a page that is opened as a file may load
// nothing else.
var minimoe = {};
(() => {
  const base = new URL("explorables/", document.currentScript.src);
  const advice = serving ? ` Some browsers forbid this to pages opened as files; ${serving} serves them at http://localhost:8000.` : "";

  // Resolves when the script is there; null where it is not.
  function load(path) {
    return new Promise((resolve) => {
      const script = document.createElement("script");
      script.src = new URL(`${path}.js`, base);
      script.onload = () => resolve(minimoe[path]);
      script.onerror = () => resolve(null);
      document.head.append(script);
      script.remove(); // it runs all the same
    });
  }

  // A file of an explorable as bytes.
  async function bytes(path) {
    const text = await load(path);
    if (!text) throw new Error(`its file ${path} could not be loaded.${advice}`);
    delete minimoe[path];
    const found = atob(text);
    const all = new Uint8Array(found.length);
    for (let i = 0; i < found.length; i += 1) all[i] = found.charCodeAt(i);
    return all;
  }

  async function start(place) {
    const name = place.dataset.explorable;
    const figure = place.querySelector("figure");
    const el = document.createElement("div");
    const given = { data: JSON.parse(place.querySelector("script").textContent), files: (file) => bytes(`${name}/${file}`) };
    place.append(el);
    const widget = minimoe[name] ?? (await load(name));
    if (widget) {
      await widget.render({ model: { get: (key) => given[key] }, el });
      if (!el.dataset.failed) figure.remove();
    } else {
      el.dataset.failed = "not loaded";
      el.textContent = `This explorable could not be loaded. The figure stands in for it.${advice}`;
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
  document.querySelectorAll(".minimoe-explorable").forEach((place) => seen.observe(place));
})();
