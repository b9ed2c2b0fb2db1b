// Paper is white: a page is printed in the light theme, whatever the screen shows.
(() => {
  const page = document.documentElement;
  let shown = null;
  window.addEventListener("beforeprint", () => {
    shown ??= page.dataset.theme;
    page.dataset.theme = "light";
  });
  window.addEventListener("afterprint", () => {
    if (shown) page.dataset.theme = shown;
    shown = null;
  });
})();

// The command that serves the book's folder, for readers who have opened a page as a file; undefined for all others.
const serving = (() => {
  if (location.protocol !== "file:") return undefined;
  const folder = decodeURI(new URL("..", document.currentScript.src).pathname).replace(/^\/(?=[A-Z]:)/, "");
  return `python -m http.server --directory "${folder}"`;
})();

// A page that was opened as a file may not read the others, so its search finds pages without quoting them.
if (serving && document.getElementById("search-results")) {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
  const said = document.createElement("p");
  said.className = "served";
  said.append("Opened as a file, the search shows titles alone. With ");
  said.append(Object.assign(document.createElement("code"), { textContent: serving }));
  said.append(" and http://localhost:8000 it quotes the pages, too.");
  document.getElementById("search-results").before(said);
}

// A press on a figure shows it large, to be scrolled; Escape or a press on 'Close' leads back.
for (const picture of document.querySelectorAll(".bd-article .cell_output img, .bd-article > section figure > img")) {
  if (picture.closest("a, button, .minimoe-explorable")) continue;
  const open = Object.assign(document.createElement("button"), { type: "button", className: "enlarge", title: "Enlarge" });
  picture.replaceWith(open);
  open.append(picture);
  open.addEventListener("click", () => {
    const dialog = Object.assign(document.createElement("dialog"), { className: "enlarged", ariaLabel: "figure, enlarged" });
    const close = Object.assign(document.createElement("button"), { type: "button", textContent: "Close" });
    const large = picture.cloneNode();
    large.removeAttribute("id");
    dialog.append(close, large);
    dialog.tabIndex = 0; // so that the keys scroll it
    close.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  });
}

// On a phone a table of sentences is read row by row, each cell under its column's name (book.css); a table of numbers scrolls.
for (const table of document.querySelectorAll(".bd-article table.table:not(.autosummary)")) {
  const names = [...table.querySelectorAll("thead th")].map((th) => th.textContent.trim());
  const rows = [...table.tBodies].flatMap((body) => [...body.rows]);
  const ofSentences = names.filter((_, column) => rows.some((row) => row.cells[column]?.textContent.trim().length > 40));
  if (names.length < 3 || ofSentences.length < 2 || rows.some((row) => row.cells.length !== names.length)) continue;
  table.classList.add("read-by-row");
  table.role = "table"; // what is laid out as a block would lose its meaning for screen readers
  for (const row of table.rows) row.role = "row";
  for (const row of rows) {
    [...row.cells].forEach((cell, column) => {
      cell.role = "cell";
      cell.dataset.column = names[column];
    });
  }
}
