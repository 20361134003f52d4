"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  table.querySelectorAll("thead button").forEach((button) => {
    button.addEventListener("click", () => {
      const header = button.closest("th");
      const turn = { none: "ascending", ascending: "descending", descending: "none" };
      const order = turn[header.getAttribute("aria-sort") || "none"];
      table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
      const column = header.cellIndex;
      const text = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const sign = order === "descending" ? -1 : 1;
      const numeric = header.classList.contains("n");
      const keyed = original.map((row) => [numeric ? parseFloat(text(row)) : text(row), row]);
      const names = new Intl.Collator(undefined, { numeric: true });
      const compare = numeric ? ([a], [b]) => sign * (a - b) : ([a], [b]) => sign * names.compare(a, b);
      const sorted = order === "none" ? original : keyed.sort(compare).map(([, row]) => row);
      if (order !== "none") header.setAttribute("aria-sort", order);
      body.append(...sorted);
    });
  });
}
for (const input of document.querySelectorAll("input[type=search]")) {
  const table = document.getElementById(input.getAttribute("aria-controls"));
  const rows = [...table.tBodies[0].rows].map((row) => [row, row.textContent.toLowerCase()]);
  const status = input.nextElementSibling;
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    let shown = 0;
    for (const [row, text] of rows) {
      row.hidden = !text.includes(wanted);
      shown += !row.hidden;
    }
    status.textContent = wanted ? `${shown} of ${rows.length}` : "";
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
