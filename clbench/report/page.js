"use strict";

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const json = (id) => JSON.parse(document.getElementById(id).textContent);

// Pictures: each is in the page once, however often it is shown.
const pictures = json("pictures");
for (const image of all("img[data-picture]")) image.src = pictures[image.dataset.picture];

// Tables: a title sorts, a second time the other way; what has no value stays last.
function sort(table, column, descending) {
  const value = (row) => row.cells[column].dataset.value;
  const numbers = table.tHead.rows[0].cells[column].classList.contains("number");
  const compare = (a, b) => (numbers ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true }));
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    return descending ? compare(y, x) : compare(x, y);
  });
  table.tBodies[0].append(...rows);
  [...table.tHead.rows[0].cells].forEach((cell, index) => {
    cell.setAttribute("aria-sort", index !== column ? "none" : descending ? "descending" : "ascending");
  });
}
for (const table of all("[data-table] table")) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    cell.querySelector("button").addEventListener("click", () => {
      const before = cell.getAttribute("aria-sort");
      const first = cell.classList.contains("number"); // the largest number is what is asked for first
      sort(table, column, before === "none" ? first : before === "ascending");
    });
  });
}

// What is shown: the page's methods and strategies, a table's own words, the gallery's category.
const form = document.querySelector(".filter");
const views = [];
function chosen(name) {
  const boxes = all(`input[name=${name}]`);
  return boxes.every((box) => box.checked) ? null : boxes.filter((box) => box.checked).map((box) => box.value);
}
function show() {
  const [methods, strategies] = [chosen("method"), chosen("strategy")];
  const passes = (row) =>
    (!methods || !row.dataset.method || methods.includes(row.dataset.method)) &&
    (!strategies || !row.dataset.strategy || strategies.includes(row.dataset.strategy));
  for (const part of all("[data-table]")) {
    const words = part.querySelector("input").value.toLowerCase().split(/\s+/);
    const rows = all("tbody tr", part);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !passes(row) || !words.every((word) => text.includes(word));
    }
    const left = rows.filter((row) => !row.hidden).length;
    part.querySelector(".count").textContent = `${left === rows.length ? "" : `${left} of `}${rows.length} row${rows.length === 1 ? "" : "s"}`;
  }
  for (const row of all(".strips tbody tr")) row.hidden = !passes(row);
  const category = document.getElementById("category");
  for (const article of all(".shown")) {
    const empty = all("tbody tr", article).every((row) => row.hidden);
    article.hidden = empty || (category.value !== "" && category.value !== article.dataset.category);
  }
  for (const view of views) view.signal("methods", methods).signal("strategies", strategies).runAsync();
}
if (form) {
  form.addEventListener("change", show);
  form.addEventListener("reset", () => setTimeout(show));
  form.addEventListener("submit", (event) => event.preventDefault());
}
for (const input of all("[data-table] input")) input.addEventListener("input", show);
document.getElementById("category")?.addEventListener("change", show);
show();

// Enlarging: the picture between the image and its mask; arrow keys go through those that are shown.
const dialog = document.getElementById("enlarged");
let current = null;
function enlarge(button) {
  current = button;
  const { image, mask, map, words } = button.dataset;
  [image, mask, map].forEach((number, index) => (all("img", dialog)[index].src = pictures[number]));
  dialog.querySelector(".words").textContent = words;
  if (!dialog.open) dialog.showModal();
}
function step(by) {
  const shown = all(".enlarge").filter((button) => button.offsetParent !== null);
  const next = shown[shown.indexOf(current) + by];
  if (next) enlarge(next);
}
for (const button of all(".enlarge")) button.addEventListener("click", () => enlarge(button));
for (const button of all("[data-step]", dialog)) button.addEventListener("click", () => step(Number(button.dataset.step)));
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
dialog.addEventListener("close", () => current?.focus());
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());

// Figures, one after the other, so that the page can be read at once.
(async () => {
  for (const [id, spec] of Object.entries(json("specs"))) {
    const { view } = await vegaEmbed(`#${id}`, spec, { actions: false, renderer: "svg" });
    views.push(view);
  }
  if (views.length) show();
  document.documentElement.dataset.drawn = String(views.length); // for who waits for it
})();
