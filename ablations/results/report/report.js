"use strict";
// Tables: a click on a title sorts, words in the field above filter.
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0];
  const titles = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.key === undefined ? cell.textContent.trim() : Number(cell.dataset.key);
  };
  titles.forEach((title, column) => {
    title.querySelector("button").addEventListener("click", () => {
      const down = title.getAttribute("aria-sort") === "ascending";
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a, column), key(b, column)];
        if ((x === "") !== (y === "")) return x === "" ? 1 : -1; // what is empty comes last, either way
        const order = typeof x === "number" && typeof y === "number"
          ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
        return down ? -order : order;
      });
      titles.forEach((other) => other.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...rows);
    });
  });
  const filter = document.querySelector(`input[data-filters="${table.id}"]`);
  if (filter) {
    const count = filter.closest("p").querySelector("output");
    const show = () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let left = 0;
      for (const row of body.rows) {
        const text = row.textContent.toLowerCase().replace(/\s+/g, " ");
        row.hidden = !words.every((word) => text.includes(word));
        left += row.hidden ? 0 : 1;
      }
      count.textContent = `${left} of ${body.rows.length} rows`;
    };
    filter.addEventListener("input", show);
    show();
  }
}
