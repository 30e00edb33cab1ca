"use strict";
{
  const all = (what, within = document) => [...within.querySelectorAll(what)];

  async function copy(button) {
    const text = button.dataset.copy;
    try { await navigator.clipboard.writeText(text); } catch {
      const area = Object.assign(document.createElement("textarea"), {value: text});
      document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
    }
    const before = button.textContent;
    button.textContent = "copied";
    setTimeout(() => { button.textContent = before; }, 1200);
  }

  const dialog = document.getElementById("large");
  let shown = null;
  function open(figure) {
    shown = figure;
    dialog.querySelector("img").src = figure.querySelector("img").src;
    dialog.querySelector("img").alt = figure.querySelector("img").alt;
    dialog.querySelector(".facts").replaceChildren(figure.querySelector("figcaption").cloneNode(true));
    if (!dialog.open) dialog.showModal();
  }
  function step(by) {
    const figures = all("figure:has(button.open)");
    const next = figures[figures.indexOf(shown) + by];
    if (next) open(next);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button"), dot = event.target.closest("svg a");
    if (dot) {  // a query in a picture of numbers
      event.preventDefault();
      const figure = document.querySelector(`figure[data-id="${dot.getAttribute("href").split("-")[1]}"]:has(button.open)`);
      if (figure) open(figure);
    } else if (button?.matches(".copy")) copy(button);
    else if (button?.matches(".open")) open(button.closest("figure"));
    else if (button?.matches(".next")) step(1);
    else if (button?.matches(".previous")) step(-1);
    else if (button?.matches(".close") || event.target === dialog) dialog.close();
  });
  document.addEventListener("keydown", (event) => {
    if (!dialog?.open) return;
    if (event.key === "ArrowRight") step(1);
    if (event.key === "ArrowLeft") step(-1);
  });

  document.addEventListener("change", ({target: select}) => {
    if (!select.matches(".sort select")) return;
    const [key, sign] = select.value.split(" ");
    const place = (figure) => figure.dataset[key] === "" ? Infinity : sign * Number(figure.dataset[key]);
    for (const gallery of all(".gallery")) gallery.append(...all("figure", gallery).sort((a, b) => place(a) - place(b)));
  });

  addEventListener("beforeprint", () => { for (const folded of all("details")) folded.open = true; });
}
