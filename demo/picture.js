// Shows which tokens a token sees, for the row of the mask or the token under the pointer or the arrow keys.
// `element` is the component; its content is replaced with every answer, so events are caught here.
let current = -1;
let shown = null;

function rowsOf(root) {
  if (!root.parsedRows) root.parsedRows = JSON.parse(root.dataset.rows);
  return root.parsedRows;
}

function show(root, index) {
  [shown, current] = [root, index];
  const tokens = root.querySelectorAll(".t");
  const row = rowsOf(root).find(([start, stop]) => start <= index && index < stop);
  const caption = root.querySelector(".caption");
  const marker = root.querySelector(".marker");
  root.classList.toggle("chosen", Boolean(row));
  marker.setAttribute("y", row ? index : -1);
  let count = 0;
  tokens.forEach((token, i) => {
    const isSeen = Boolean(row) && row[2].some(([from, to]) => from <= i && i < to);
    count += isSeen;
    token.classList.toggle("seen", isSeen);
    token.classList.toggle("query", i === index);
  });
  if (!row) {
    caption.textContent = caption.dataset.hint;
    return;
  }
  const { text, note } = tokens[index].dataset;
  caption.textContent =
    `Token ${index + 1}, ${JSON.stringify(text)} (${note}), sees ${count} of ${tokens.length} tokens.`;
}

function indexAt(event) {
  const token = event.target.closest(".t");
  if (token) return Number(token.dataset.i);
  const svg = event.target.closest("svg.mask");
  if (!svg) return -1;
  const box = svg.getBoundingClientRect();
  const total = svg.viewBox.baseVal.height;
  return Math.min(total - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * total)));
}

for (const kind of ["pointermove", "click"]) {
  element.addEventListener(kind, (event) => {
    const root = event.target.closest(".attention");
    const index = root ? indexAt(event) : -1;
    if (index >= 0 && (index !== current || root !== shown)) show(root, index);
  });
}
element.addEventListener("pointerleave", () => {
  const root = element.querySelector(".attention");
  if (root && document.activeElement !== root.querySelector(".strip")) show(root, -1);
});
element.addEventListener("focusin", (event) => {
  const root = event.target.closest(".attention");
  if (event.target.matches(".strip") && (current < 0 || root !== shown)) show(root, 0);
});
element.addEventListener("focusout", (event) => {
  if (event.target.matches(".strip")) show(event.target.closest(".attention"), -1);
});
element.addEventListener("keydown", (event) => {
  if (!event.target.matches(".strip")) return;
  const root = event.target.closest(".attention");
  const total = root.querySelectorAll(".t").length;
  const places = { ArrowLeft: current - 1, ArrowUp: current - 1, ArrowRight: current + 1, ArrowDown: current + 1 };
  const next = { ...places, Home: 0, End: total - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  show(root, Math.min(total - 1, Math.max(0, next)));
  root.querySelector(".query").scrollIntoView({ block: "nearest" });
});
