"""Style and script of the page of a batch, on top of the dataset card's style."""

MAX_NATS = 10  # that still have a colour of their own
SHADES = 20  # half a nat each


def _shades() -> str:
    """More loss, more colour; the text above stays readable in all of them."""
    return "".join(f".k{shade}{{--k:{(shade / (SHADES - 1)) ** 0.9:.3f}}}" for shade in range(SHADES))


STYLE_OF_BATCH = (
    """
:root{--heat:222 96 20;--most:.62}
@media (prefers-color-scheme:dark){:root{--heat:240 128 60;--most:.5}}
[class^=k],.chip{background:rgb(var(--heat)/calc(var(--k,0)*var(--most)))}
"""
    + _shades()
    + """
a{color:var(--docs);text-decoration-thickness:.06em;text-underline-offset:.15em}
.legend{max-width:22rem;margin:0 0 1.2rem}
.legend figcaption{font-weight:400;font-size:.82rem;color:var(--soft)}
.legend div{display:flex;height:.8rem;margin:.35rem 0 .2rem;border:1px solid var(--line);border-radius:.2rem;
overflow:hidden}
.legend i{flex:1}
.legend p{display:flex;justify-content:space-between;margin:0;font-size:.78rem;color:var(--soft);
font-variant-numeric:tabular-nums}
#controls{display:flex;flex-wrap:wrap;align-items:center;gap:.6rem 1.4rem;margin:0 0 .4rem;font-size:.88rem;
color:var(--soft)}
#controls[hidden]{display:none}
#controls label{display:flex;align-items:center;gap:.5rem}
#controls select,#controls input{font:inherit;color:var(--ink);background:var(--page);padding:.3rem .55rem;
border:1px solid var(--line);border-radius:.35rem;max-width:100%}
#controls input{width:15rem}
.batch td,.batch th{padding-top:.34rem;padding-bottom:.34rem;vertical-align:middle}
.batch tbody th{min-width:0}
.parts{min-width:9.5rem;font-variant-numeric:tabular-nums}
.parts a{display:inline-block;min-width:1.5em;margin:.08rem .1rem;padding:0 .2rem;line-height:1.45;text-align:center;
border-radius:.25rem;text-decoration:none;background:var(--box)}
.parts a:hover{text-decoration:underline}
@media (min-width:34.01rem){.tiles div{flex-basis:7.5rem}}
.batch .strip{width:34%;min-width:9rem}
.strip div{display:flex;height:1.05rem;border-radius:.2rem;overflow:hidden;box-shadow:inset 0 0 0 1px var(--line)}
.strip i{flex:1}
article.row{margin:0 0 1.3rem;content-visibility:auto;contain-intrinsic-size:auto 24rem;scroll-margin-top:1rem}
article.row>header{display:flex;flex-wrap:wrap;align-items:baseline;gap:.1rem .9rem;max-width:none;margin:0;
padding:.7rem 1.1rem;border-bottom:1px solid var(--line);background:var(--box)}
article.row h3{margin:0;font-size:1.02rem}
article.row h3 a{color:inherit;text-decoration:none}
article.row header p{flex:1;margin:0;color:var(--soft);font-size:.84rem;font-variant-numeric:tabular-nums}
.chip{padding:.1rem .5rem;border-radius:.3rem;font-weight:500;font-size:.84rem;font-variant-numeric:tabular-nums}
.part{padding:.85rem 1.1rem 1rem;scroll-margin-top:1rem}
.part+.part{border-top:1px dashed var(--line)}
.part:target,article.row:target{outline:2px solid var(--docs);outline-offset:-2px;border-radius:.5rem}
.part h4{display:flex;gap:.5rem;margin:0;font-size:.92rem;font-weight:500;overflow-wrap:anywhere;unicode-bidi:isolate}
.part h4 span:first-child{color:var(--soft);font-weight:400}
.part>p,article.row header p{display:flex;flex-wrap:wrap;gap:0 1.1rem}
.part>p{max-width:none;margin:.1rem 0 .6rem;color:var(--soft);font-size:.8rem;overflow-wrap:anywhere}
.part blockquote{max-height:none;max-width:44rem;padding:0;overflow:visible;line-height:1.72}
.part blockquote i{font-style:normal;border-radius:.15rem;box-decoration-break:clone;
-webkit-box-decoration-break:clone;padding:.1rem 0}
.part blockquote i[title]:hover,.part blockquote i.on{outline:1.5px solid var(--docs)}
.eot{font:500 .74em ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;color:var(--soft);
margin-right:.35em}
i .eot{margin:0;color:inherit}
s{text-decoration:none}
s::before{content:"↵";color:var(--soft);opacity:.6}
#token{position:fixed;left:50%;bottom:1rem;transform:translateX(-50%);z-index:1;width:max-content;
max-width:calc(100vw - 2rem);padding:.5rem .9rem;border:1px solid var(--line);border-radius:.5rem;
background:var(--page);box-shadow:0 .3rem 1.2rem rgb(0 0 0/.18);font-size:.86rem;white-space:pre-line;
font-variant-numeric:tabular-nums}
#token[hidden]{display:none}
@media (max-width:34rem){.batch .span,.parts{display:none}.batch .strip{min-width:7rem}
article.row header p{order:1;flex-basis:100%}article.row>header{justify-content:space-between}
#controls input{width:12rem}
article.row>header,.part{padding-left:.85rem;padding-right:.85rem}}
@media print{#controls,#token{display:none}article.row{content-visibility:visible;break-inside:auto}}
"""
)

# Reads the page's own elements only. It orders and hides rows, and shows a token's numbers where a touch or click is.
SCRIPT = """
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
"""
