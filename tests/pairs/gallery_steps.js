// Operates the gallery like a user, and stores the results as an attribute of the body.
const seen = [];
const note = () => seen.push([
  document.getElementById("count").textContent,
  [...document.querySelectorAll("summary code")].map((n) => n.textContent).slice(0, 3),
]);
const key = (name) =>
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
const set = (id, value, event) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event(event));
  note();
};
note();
key("ArrowRight"); note();
key("ArrowRight"); key("ArrowRight"); key("ArrowRight"); note();
key("ArrowLeft"); note();
key("/"); seen.push(document.activeElement.id); document.activeElement.blur();
set("search", "NUMBER 41 dog", "input");
set("search", "no such words", "input");
set("search", "", "input");
set("order", "similar", "change");
set("order", "near", "change");
set("verdict", "visual margin above 0", "change");
seen.push([...document.querySelectorAll("mark")].slice(0, 2).map((n) => n.textContent));
setTimeout(() => {
  seen.push([...document.images].slice(0, 2).map((n) => n.naturalWidth));
  document.body.dataset.seen = JSON.stringify(seen);
}, 1000);
