// What pages are made of: sections, grids, images, tables. A section without content is left out.

const data = JSON.parse(document.getElementById("data").textContent);
const [BLUE, ORANGE, GREEN, RED, VIOLET] = ["blue", "orange", "green", "red", "violet"].map((name) => `var(--${name})`);

function section(id, title, note, ...content) {
  const parts = content.filter(Boolean);
  if (!parts.length) return;
  document.getElementById("main").append(make("section", { id }, make("h2", {}, title), note ? make("p", { className: "note" }, note) : null, ...parts));
  document.querySelector("#nav div").append(make("a", { href: `#${id}` }, title));
}

function grid(...content) {
  const parts = content.filter(Boolean);
  return parts.length ? make("div", { className: "grid" }, ...parts) : null;
}

function image(source, alt, width, height) {
  const image = make("img", { src: source, alt, width, height, loading: "lazy" });
  image.addEventListener("click", () => {
    const zoom = document.getElementById("zoom");
    zoom.querySelector("img").src = source;
    zoom.querySelector("img").alt = alt;
    zoom.showModal();
  });
  return image;
}

// columns: [{key, name, format, meter}]; the first is text. Click on a head sorts by it, once more turns it round.
function sortableTable(rows, columns, sortedBy) {
  const body = make("tbody");
  const heads = columns.map((column) => {
    const button = make("button", { type: "button" }, column.name);
    const head = make("th", { scope: "col" }, button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      sort(column, now ? now !== "descending" : column.key !== columns[0].key);
    });
    return head;
  });
  function sort(column, descending) {
    const sign = descending ? -1 : 1;
    const order = [...rows].sort((a, b) => {
      const [one, other] = [a[column.key], b[column.key]];
      const [gone, otherGone] = [one === null || one === undefined, other === null || other === undefined];
      if (gone || otherGone) return gone - otherGone;  // what is undefined comes last either way
      return sign * (typeof one === "string" ? one.localeCompare(other) : one - other);
    });
    heads.forEach((head, k) => (columns[k] === column ? head.setAttribute("aria-sort", descending ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
    body.replaceChildren(...order.map((row) => make("tr", {}, ...columns.map((one) => {
      const text = one.format ? one.format(row[one.key]) : row[one.key];
      const meter = one.meter && isNumber(row[one.key])
        ? make("span", { className: "meter" }, make("i", { style: `width:${100 * row[one.key]}%` })) : null;
      return make("td", one === columns[0] ? { title: text } : {}, meter, text);
    }))));
  }
  sort(columns.find((one) => one.key === sortedBy), true);
  return make("div", { className: "scroll" }, make("table", { className: "sortable" }, make("thead", {}, make("tr", {}, ...heads)), body));
}

function textTable(rows) {
  return make("table", { className: "text" }, make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, cell))))));
}

function head() {
  const tiles = data.tiles.map(([name, value], k) => make("div", { className: k ? "tile" : "tile first" }, make("b", {}, value), make("span", {}, name)));
  document.getElementById("head").append(make("h1", {}, data.title), make("p", { className: "sub" }, data.subtitle), make("div", { className: "tiles" }, ...tiles));
  document.getElementById("nav").append(make("div"));
}

document.getElementById("zoom").addEventListener("click", (event) => event.currentTarget.close());
