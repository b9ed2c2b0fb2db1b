// Paper is white: a page is printed in the light theme, whatever the screen shows.
(() => {
  const page = document.documentElement;
  let shown = null;
  window.addEventListener("beforeprint", () => {
    shown = page.dataset.theme;
    page.dataset.theme = "light";
  });
  window.addEventListener("afterprint", () => {
    if (shown) page.dataset.theme = shown;
  });
})();
