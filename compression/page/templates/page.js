"use strict";
(function () {
  const ERRORS = 1;  // as Vega counts its levels
  const { config, charts } = JSON.parse(document.getElementById("specs").textContent);

  // Vega computes expressions itself (ast): the page forbids code that is made from text. Of logs only errors are
  // shown: an axis that can be chosen, and has no spread, is no news.
  function draw(place) {
    if (place.dataset.begun || !place.offsetParent) return;
    place.dataset.begun = "yes";
    const choose = document.getElementById(place.id + "-choose");
    const options = { config: config, renderer: "svg", actions: false, ast: true, logLevel: ERRORS, tooltip: { theme: "custom" } };
    if (choose) options.bind = choose;
    vegaEmbed(place, charts[place.id], options)
      .then(function () { place.classList.add("drawn"); })
      .catch(function (problem) { place.textContent = "This chart could not be drawn: " + problem.message; console.error(problem); });
  }

  const places = Array.from(document.querySelectorAll(".chart"));
  const watch = new IntersectionObserver(function (entries) {
    entries.forEach(function (entry) { if (entry.isIntersecting) draw(entry.target); });
  }, { rootMargin: "400px" });
  places.forEach(function (place) { watch.observe(place); });

  // A link into a folded section opens it.
  function open() {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target && target.tagName === "DETAILS") { target.open = true; target.scrollIntoView(); }
  }
  window.addEventListener("hashchange", open);
  open();

  // Paper has no folded sections; what is not drawn yet is drawn at once.
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details.model").forEach(function (section) {
      if (!section.open) { section.dataset.folded = "yes"; section.open = true; }
    });
    places.forEach(draw);
  });
  window.addEventListener("afterprint", function () {
    document.querySelectorAll("details[data-folded]").forEach(function (section) {
      section.open = false;
      delete section.dataset.folded;
    });
  });

  function value(row, column) {
    const cell = row.cells[column];
    return cell.dataset.sort === undefined ? cell.textContent : Number(cell.dataset.sort);
  }

  function compare(first, second) {
    if (typeof first === "number" && typeof second === "number") return first - second;
    return String(first).localeCompare(String(second), undefined, { numeric: true });
  }

  document.querySelectorAll("table.sortable th").forEach(function (title) {
    title.addEventListener("click", function () {
      const table = title.closest("table"), body = table.tBodies[0];
      const down = title.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
      title.setAttribute("aria-sort", down ? "descending" : "ascending");
      Array.from(body.rows)
        .sort(function (a, b) { return (down ? -1 : 1) * compare(value(a, title.cellIndex), value(b, title.cellIndex)); })
        .forEach(function (row) { body.append(row); });
    });
  });
})();
