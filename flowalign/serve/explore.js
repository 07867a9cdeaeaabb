"use strict";
const prompt = document.getElementById("prompt"), seed = document.getElementById("seed");
const says = document.getElementById("says");
const told = document.getElementById("controls").dataset.told;
const sliders = [...document.querySelectorAll(".slider input")];
const pictures = [...document.querySelectorAll(".pictures img")];

// Weights sum to 1; scores stand each for itself.
function asked() {
  const values = sliders.map(slider => Number(slider.value));
  const total = values.reduce((sum, value) => sum + value, 0);
  return total ? values.map(value => value / (told === "scores" ? 100 : total)) : null;
}

function address(picture) {
  const query = new URLSearchParams({prompt: prompt.value, seed: String(first() + Number(picture.dataset.offset))});
  const values = picture.dataset.side === "steered" ? asked() : null;
  for (const value of values ?? []) query.append("w", value.toFixed(3));
  return "/picture?" + query;
}

function first() {
  return Math.max(0, Math.trunc(Number(seed.value)) || 0);
}

// Each picture has one request on its way at most; when it is there, the newest wish is asked for.
function ask(picture) {
  const wanted = address(picture);
  if (picture.dataset.shown === wanted) { picture.classList.remove("late"); return; }
  picture.classList.add("late");
  if (picture.dataset.asked) return;
  picture.dataset.asked = wanted;
  picture.src = wanted;
}

function update() {
  const values = asked();
  sliders.forEach((slider, place) => {
    slider.previousElementSibling.value = values ? values[place].toFixed(2) : "none";
  });
  if (!prompt.value.trim()) { says.textContent = "Write a prompt."; return; }
  says.textContent = values ? "" : `All sliders are at 0: drawn without ${told}.`;
  pictures.forEach(ask);
}

for (const picture of pictures) {
  picture.addEventListener("load", () => {
    picture.dataset.shown = picture.dataset.asked;
    const under = told === "scores" ? "for these scores" : "under these weights";
    picture.alt = `${prompt.value}, ${picture.dataset.side === "steered" ? under : `without ${told}`}`;
    delete picture.dataset.asked;
    ask(picture);
  });
  picture.addEventListener("error", () => {
    const failed = picture.dataset.asked;
    delete picture.dataset.asked;
    if (failed !== address(picture)) { ask(picture); return; }
    says.textContent = "A picture could not be drawn; the server's log says why.";
  });
}
for (const input of [prompt, seed, ...sliders]) input.addEventListener("input", update);
document.getElementById("next").addEventListener("click", () => {
  seed.value = String(first() + pictures.length / 2);
  update();
});
document.getElementById("controls").addEventListener("submit", event => event.preventDefault());
update();
