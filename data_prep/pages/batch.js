const $ = id => document.getElementById(id), controls = $("controls"), find = $("find"), order = $("order");
const rows = [...document.querySelectorAll("article.row")].map(article => ({
  article, line: document.querySelector(`#table tr[data-row="${article.dataset.row}"]`),
  row: +article.dataset.row, loss: +article.dataset.loss, text: article.textContent.toLowerCase()}));
controls.hidden = false;
controls.addEventListener("submit", event => event.preventDefault());
function arrange() {
  const sign = {row: 0, high: -1, low: 1}[order ? order.value : "row"];
  rows.sort((a, b) => sign * (a.loss - b.loss) || a.row - b.row);
  $("rows").append(...rows.map(each => each.article));
  $("table").append(...rows.map(each => each.line));
}
function filter() {
  const wanted = find.value.toLowerCase();
  let shown = 0;
  for (const {article, line, text} of rows) {
    const fits = text.includes(wanted);
    article.hidden = line.hidden = !fits;
    article.style.display = fits ? "" : "none";
    shown += fits;
  }
  $("count").textContent = wanted ? `${shown} of ${rows.length} rows` : "";
}
if (order) order.addEventListener("change", arrange);
find.addEventListener("input", filter);
let on = null;
document.addEventListener("click", event => {
  if (on) on.classList.remove("on");
  on = event.target.closest("blockquote i[title]");
  $("token").hidden = !on;
  if (on) { on.classList.add("on"); $("token").textContent = on.title; }
});
if (order) arrange();
filter();
