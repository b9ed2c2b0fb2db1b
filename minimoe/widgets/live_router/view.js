// What the live router shows: the tokens, one token's probabilities, the load.

const LOOK = `
.lr { --lr-1: #9bd1f3; --lr-2: #f6bf6a; --lr-3: #7fd6b4; --lr-4: #f0e36a; --lr-5: #a9b8f5; --lr-6: #f7a283; --lr-7: #e9aed6; --lr-8: #c9c9c9; --lr-ink: #1a1a1a; }
.lr textarea { width: 100%; box-sizing: border-box; resize: vertical; line-height: 1.4; }
.lr label.lr-label { display: block; margin-top: 0.5rem; }
.lr-tokens { margin: 0.5rem 0; padding: 0.25rem; min-height: 9rem; max-height: 24rem; overflow-y: auto; line-height: 1; }
.lr-token { display: inline-block; position: relative; vertical-align: top; margin: 0 1px 4px 0; color: var(--lr-ink); cursor: pointer; border-radius: 3px; max-width: 100%; overflow: hidden; unicode-bidi: isolate; }
.lr-token.lr-end { margin-inline-end: 7px; }
.lr-token bdi { display: block; padding: 3px 3px 2px; min-width: 1.6em; box-sizing: border-box; text-align: center; white-space: pre; overflow: hidden; text-overflow: ellipsis; font-size: 0.9375rem; line-height: 1.25; }
.lr-token span { display: grid; grid-template-columns: 1fr 1fr; font-size: 0.6875rem; line-height: 1.3; text-align: center; }
.lr-token b { border-top: 1px solid var(--lr-ink); }
.lr-token i { border-top: 1px solid var(--lr-ink); border-inline-start: 1px solid var(--lr-ink); font-style: normal; }
.lr-token[aria-selected="true"] { box-shadow: 0 0 0 2px var(--mm-back), 0 0 0 4px var(--mm-text); z-index: 1; }
.lr-token:hover { box-shadow: 0 0 0 2px var(--mm-line); }
.lr :is(.lr-cut, .lr-gone) { border-left: 3px solid var(--mm-vermillion); padding-left: 0.5rem; }
.lr :is(.lr-cut, .lr-gone):empty { display: none; }
.lr-both { display: flex; flex-wrap: wrap; gap: 0.5rem 1.5rem; align-items: flex-start; }
.lr-both > * { flex: 1 1 17rem; min-width: 0; }
.lr .lr-detail { border-collapse: separate; border-spacing: 1px; font-size: 0.8125rem; font-variant-numeric: tabular-nums; margin: 0; width: auto; }
.lr .lr-detail caption { caption-side: top; text-align: start; color: var(--mm-text); padding: 0 0 0.25rem; font-size: 0.9375rem; min-height: 2.9em; unicode-bidi: isolate; }
.lr .lr-detail :is(th, td) { padding: 2px 4px; border: 0; text-align: right; min-width: 1.9rem; font-weight: normal; color: var(--mm-text); line-height: 1.3; }
.lr .lr-detail td { background: color-mix(in srgb, var(--mm-blue) calc(var(--p, 0) * 45%), var(--mm-back)); }
.lr .lr-detail td.lr-chosen { font-weight: bold; box-shadow: inset 0 0 0 2px var(--mm-text); }
.lr .lr-detail th.lr-now { text-decoration: underline; font-weight: bold; }
.lr .lr-detail .lr-name { text-align: center; color: var(--lr-ink); font-weight: bold; border-radius: 3px; }
.lr .lr-detail tfoot td { background: none; }
.lr-break { margin: 0.5rem 0; }
.lr-break label { display: block; padding: 2px 4px; text-align: center; cursor: pointer; }
.lr-break input { inline-size: 1.15rem; block-size: 1.15rem; margin: 0; }
.lr-live { display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem; min-height: 2.2rem; }
.lr-costs { min-height: 2.9em; }
.lr-next { display: grid; grid-template-columns: minmax(5rem, 1fr) 2fr 3.5rem; gap: 0.5rem; align-items: center; width: 100%; max-width: 30rem; font: inherit; text-align: start; color: var(--mm-text); background: none; border: 0; border-radius: 3px; padding: 1px 2px; cursor: pointer; }
.lr-next:hover { box-shadow: 0 0 0 1px var(--mm-focus); }
.lr-next bdi { white-space: pre; overflow: hidden; text-overflow: ellipsis; }
.lr-next i { height: 0.9em; width: calc(100% * var(--p)); background: var(--mm-sky); }
.lr-next output { text-align: end; font-variant-numeric: tabular-nums; }
.lr-tour { border: 1px solid var(--mm-focus); border-radius: 0.25rem; padding: 0.5rem 0.75rem; margin: 0.5rem 0; }
.lr-tour[hidden] { display: none; }
.lr-tour p { min-height: 4.4em; }
.lr-compact .lr-more { display: none; }
.lr-compact .lr-tokens { min-height: 0; }
@media (max-width: 480px) { .lr .lr-detail { font-size: 0.75rem; } .lr .lr-detail :is(th, td) { padding: 2px; min-width: 1.6rem; } }
`;

const colour = (expert) => `var(--lr-${(expert % 8) + 1})`;
const ahead = /^␣(?!␣|$)/; // a blank before a word is shown as a gap

// The tokens as a list to walk through: {element, show(tokens), paint(choice), active}. `tokens` are {text}; choice(t) is
// {experts, weights} of token t at the layer shown. `onchoose(t)` when one is focused, hovered or left (undefined).
export function tokenList(onchoose) {
  let items = [];
  let active = 0;
  const element = h("div", { class: "lr-tokens mm-live", role: "listbox", "aria-label": "tokens of the text, each with its first and second expert", "aria-orientation": "horizontal" });
  const at = (event) => items.indexOf(event.target.closest(".lr-token"));

  function activate(t, focus = true) {
    items[active]?.setAttribute("tabindex", -1);
    items[active]?.setAttribute("aria-selected", false);
    active = Math.max(0, Math.min(items.length - 1, t));
    items[active]?.setAttribute("tabindex", 0);
    items[active]?.setAttribute("aria-selected", true);
    if (focus) items[active]?.focus();
    onchoose(active);
  }

  // The token nearest to the active one in the next line (step 1) or the one before (−1).
  function beyond(step) {
    const here = items[active];
    const lines = items.filter((item) => Math.sign(item.offsetTop - here.offsetTop) === step);
    const top = step > 0 ? Math.min(...lines.map((i) => i.offsetTop)) : Math.max(...lines.map((i) => i.offsetTop));
    const middle = (item) => item.offsetLeft + item.offsetWidth / 2;
    const line = lines.filter((item) => item.offsetTop === top);
    line.sort((a, b) => Math.abs(middle(a) - middle(here)) - Math.abs(middle(b) - middle(here)));
    return line.length ? items.indexOf(line[0]) : active;
  }

  element.addEventListener("keydown", (event) => {
    const forward = element.dir === "rtl" ? -1 : 1;
    const moves = {
      ArrowRight: () => active + forward, ArrowLeft: () => active - forward, ArrowDown: () => beyond(1), ArrowUp: () => beyond(-1),
      Home: () => 0, End: () => items.length - 1,
    };
    if (!items.length || !moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    activate(moves[event.key]());
  });
  element.addEventListener("click", (event) => at(event) >= 0 && activate(at(event)));
  element.addEventListener("focusin", (event) => at(event) >= 0 && at(event) !== active && activate(at(event), false));
  element.addEventListener("mouseover", (event) => at(event) >= 0 && onchoose(at(event)));
  element.addEventListener("mouseleave", () => onchoose(active));

  return {
    element,
    activate: (t) => items.length && activate(t, false),
    show(tokens, direction) {
      element.dir = direction;
      items = tokens.map(({ text }, t) =>
        h("span", { class: ahead.test(tokens[t + 1]?.text) ? "lr-token lr-end" : "lr-token", role: "option", tabindex: -1, "data-roving": true, "aria-selected": false },
          h("bdi", {}, text.replace(ahead, "")), h("span", {}, h("b"), h("i"))));
      element.replaceChildren(...items.flatMap((item, t) => (tokens[t].text.includes("↵") ? [item, h("br")] : [item])));
      if (items.length) activate(Math.min(active, items.length - 1), false);
      else onchoose(undefined);
    },
    paint(choice, tokens) {
      items.forEach((item, t) => {
        const { experts, weights } = choice(t);
        const [first, second] = item.querySelectorAll("b, i");
        item.style.background = colour(experts[0]);
        first.textContent = experts[0] + 1;
        second.textContent = weights[1] ? experts[1] + 1 : "–";
        second.style.background = colour(experts[weights[1] ? 1 : 0]);
        const said = experts.filter((_, i) => weights[i]).map((e, i) => `expert ${e + 1} with ${percent(weights[i])}`).join(", ");
        item.setAttribute("aria-label", `${tokens[t].text.replace(ahead, "")}: ${said}`);
        item.title = `${tokens[t].text}: ${said}`;
      });
    },
  };
}

// One token's probabilities, experts × layers: {element, show(token, choices), mark(layer)}; choices [L] are
// {probs, experts, weights}.
export function detail(layers, experts) {
  const every = (n) => Array.from({ length: n }, (_, i) => i);
  const caption = h("caption");
  const heads = every(layers).map((l) => h("th", { scope: "col" }, String(l + 1)));
  const cells = every(experts).map(() => every(layers).map(() => h("td")));
  const feet = every(layers).map(() => h("td"));
  const row = (e) => h("tr", {}, h("th", { scope: "row", class: "lr-name", style: `background: ${colour(e)}` }, String(e + 1)), cells[e]);
  const element = h("div", { class: "mm-scroll", tabindex: 0, role: "region", "aria-label": "one token at every layer" },
    h("table", { class: "lr-detail" }, caption,
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "layer"), heads)),
      h("tbody", {}, every(experts).map(row)),
      h("tfoot", {}, h("tr", {}, h("th", { scope: "row" }, "weights"), feet))));
  return {
    element,
    mark: (layer) => heads.forEach((head, l) => head.classList.toggle("lr-now", l === layer)),
    show(name, choices, cost) {
      caption.replaceChildren(...(name ? ["Token ", h("bdi", {}, name), `, which cost ${cost.toFixed(1)} nats: probability of each expert at each layer. Framed: those that read it, with their weights below.`] : ["No token."]));
      every(layers).forEach((l) => {
        const choice = choices?.[l];
        every(experts).forEach((e) => {
          const cell = cells[e][l];
          cell.textContent = choice ? short(choice.probs[e]) : "";
          cell.style.setProperty("--p", choice ? choice.probs[e] : 0);
          cell.classList.toggle("lr-chosen", Boolean(choice?.weights[choice.experts.indexOf(e)]));
        });
        feet[l].replaceChildren(...(choice ? choice.weights.flatMap((w) => [short(w), h("br")]).slice(0, -1) : []));
      });
    },
  };
}

// A switch for every expert at every layer: {element, off(), reset()}; off() are the [layer, expert] that are off. A layer
// keeps one expert.
export function switches(layers, experts, onchange) {
  const every = (n) => Array.from({ length: n }, (_, i) => i);
  const boxes = every(layers).map((l) => every(experts).map((e) => h("input", { type: "checkbox", checked: true, "aria-label": `expert ${e + 1} at layer ${l + 1}`, oninput: changed })));
  const off = () => boxes.flatMap((column, l) => every(experts).filter((e) => !column[e].checked).map((e) => [l, e]));
  function guard() {
    for (const column of boxes) {
      const on = column.filter((box) => box.checked);
      for (const box of column) box.disabled = on.length === 1 && box.checked;
    }
  }
  function reset() {
    for (const box of boxes.flat()) box.checked = true;
    guard();
  }
  function changed() {
    guard();
    onchange();
  }
  const row = (e) => h("tr", {}, h("th", { scope: "row", class: "lr-name", style: `background: ${colour(e)}` }, String(e + 1)), boxes.map((column) => h("td", {}, h("label", {}, column[e]))));
  const element = h("details", { class: "lr-break" },
    h("summary", {}, `Break it: a switch for each of ${experts} experts at ${layers} layers`),
    h("p", {}, "Switch experts off. Their tokens go to the next best one, and the loss of the text follows. Which ones are missed, those that read much, or others? Each layer keeps one expert."),
    h("div", { class: "mm-scroll", tabindex: 0, role: "region", "aria-label": "switches" },
      h("table", { class: "lr-detail" },
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "layer"), every(layers).map((l) => h("th", { scope: "col" }, String(l + 1))))),
        h("tbody", {}, every(experts).map(row)))),
    h("div", { class: "mm-buttons" }, button("All on", () => (reset(), onchange()))));
  return { element, off, reset };
}

// Bars of this text's load [E], with a domain's average as lines.
export function loadBars(width, own, average) {
  const [height, top, left] = [130, 8, 40];
  const highest = Math.max(0.3, ...own, ...average) * 1.05;
  const step = (width - left) / average.length;
  const y = (share) => top + height * (1 - share / highest);
  const ticks = [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1].filter((tick) => tick < highest && (tick < 0.5 ? highest < 0.6 : true));
  const grid = ticks.flatMap((tick) => [
    h("line", { x1: left - 4, x2: width, y1: y(tick), y2: y(tick), class: tick ? "mm-grid" : "mm-axis" }),
    h("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end", class: "mm-quiet" }, percent(tick)),
  ]);
  const bars = own.flatMap((share, e) => {
    const x = left + e * step;
    return [
      h("rect", { x: x + step * 0.18, width: step * 0.64, y: y(share), height: y(0) - y(share), fill: colour(e), stroke: "var(--mm-line)" }),
      h("line", { x1: x + step * 0.06, x2: x + step * 0.94, y1: y(average[e]), y2: y(average[e]), stroke: "var(--mm-text)", "stroke-width": 3 }),
      h("text", { x: x + step / 2, y: top + height + 16, "text-anchor": "middle", "font-weight": "bold" }, String(e + 1)),
      h("text", { x: x + step / 2, y: top + height + 31, "text-anchor": "middle" }, percent(share)),
    ];
  });
  return [...grid, ...bars, h("text", { x: left + (width - left) / 2, y: top + height + 47, "text-anchor": "middle", class: "mm-quiet" }, "expert, and its share of this text")];
}

// What may come after the text: {element, show(tokens, probs)}; tokens are {text, written}, and `onpick(text)` gets the one
// that is pressed.
export function nextTokens(onpick) {
  const element = h("div", { class: "mm-live", role: "group", "aria-label": "the likeliest next tokens" });
  return {
    element,
    show(tokens, probs) {
      element.replaceChildren(...tokens.map(({ text, written: seen }, i) => {
        const [bar, share] = [h("i"), h("output", {}, percent(probs[i], 1))];
        bar.style.setProperty("--p", probs[i]);
        const name = seen || "end of text";
        return h("button", { type: "button", class: "lr-next", disabled: !text, "aria-label": `${name}, ${percent(probs[i], 1)}: write it`, onclick: () => onpick(text) }, h("bdi", {}, name), bar, share);
      }));
    },
  };
}
