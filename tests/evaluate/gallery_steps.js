// Chooses files, rules and states like a user, and stores what is shown as an attribute of the body.
const seen = [];
const texts = (selector) => [...document.querySelectorAll(selector)].map((n) => n.textContent);
const note = () => seen.push([texts("summary code"), texts("#verdict option").slice(1)]);
const set = (id, value) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("change"));
  note();
};
note();
seen.push(texts("#totals li"), texts("#rule option"), texts("#group option"));
for (const state of ["fixed", "broken", "both wrong", "both right", "answers differ"]) {
  set("verdict", state);
}
set("rule", "exact");
seen.push(texts("#totals li"));
set("verdict", "fixed");
seen.push(texts("article .state"), texts(".answer h2").slice(0, 2), texts("mark").slice(0, 2));
set("group", "popular");
set("verdict", "");
set("group", "");
set("order", "most");
seen.push(document.documentElement.scrollWidth <= window.innerWidth);
document.body.dataset.seen = JSON.stringify(seen);
