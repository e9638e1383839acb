"use strict";
(() => {
  const rows = JSON.parse(document.getElementById("rows").textContent);
  const body = document.querySelector("#table tbody");
  const filter = document.getElementById("filter");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const heads = [...document.querySelectorAll("#table thead button")];
  const page = 100, last = heads.length - 1;
  let shown = page, column = 0, sign = 1;

  const text = (value, place) => {
    if (value === null) return "";
    if (place < 2) return place ? value.toLocaleString("en") : value;
    return place === 6 ? (100 * value).toFixed(1) + " %" : Number(value.toPrecision(4)).toString();
  };
  const keys = (names) => {
    const details = document.createElement("details");
    details.append(Object.assign(document.createElement("summary"), { textContent: names.length }));
    details.append(...names.map((name) => {
      const line = document.createElement("p");
      line.append(Object.assign(document.createElement("code"), { textContent: name }));
      return line;
    }));
    return details;
  };
  const compare = (a, b) => {
    const [x, y] = column === last ? [a[last].length, b[last].length] : [a[column], b[column]];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (typeof x === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true }));
  };
  const render = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter((row) => {
      const names = (row[0] + "\n" + row[last].join("\n")).toLowerCase();
      return words.every((word) => names.includes(word));
    });
    found.sort(compare);
    body.replaceChildren(...found.slice(0, shown).map((row) => {
      const line = document.createElement("tr");
      row.forEach((value, place) => {
        const cell = document.createElement("td");
        if (place === last && value.length) cell.append(keys(value));
        else if (place < last) cell.textContent = text(value, place);
        cell.className = place ? "n" : "name";
        line.append(cell);
      });
      return line;
    }));
    count.textContent = `${found.length} of ${rows.length} tensors`;
    more.hidden = found.length <= shown;
    heads.forEach((head, place) => {
      const order = place === column ? (sign > 0 ? "ascending" : "descending") : "none";
      head.parentElement.setAttribute("aria-sort", order);
    });
  };
  heads.forEach((head, place) => head.addEventListener("click", () => {
    sign = place === column ? -sign : 1;
    column = place;
    render();
  }));
  filter.addEventListener("input", () => { shown = page; render(); });
  more.addEventListener("click", () => { shown += 10 * page; render(); });
  render();
})();
