// Sorts and filters the gallery. Without this script the page is complete, in the order in which it was written.
document.documentElement.classList.add("js");
const FIRST = 40; // cards shown at once
const gallery = document.getElementById("gallery");
if (gallery) {
  const cards = Array.from(gallery.children);
  for (const card of cards) card.tabIndex = -1;
  const key = document.getElementById("key"), way = document.getElementById("way");
  const find = document.getElementById("find"), said = document.getElementById("said");
  const more = document.getElementById("more");
  let all = false;
  const cell = (card) => card.querySelector(`data[data-key="${key.value}"]`);
  const score = (card) => { const data = cell(card); return data && data.value !== "" ? Number(data.value) : null; };
  const show = () => {
    const sign = way.value === "down" ? -1 : 1, words = find.value.trim().toLowerCase();
    const rows = cards.map((card, place) => ({ card, place, value: score(card) }));
    rows.sort((a, b) => {
      if (a.value === null || b.value === null) return (a.value === null) - (b.value === null) || a.place - b.place;
      return sign * (a.value - b.value) || a.place - b.place; // pictures without the score come last, either way
    });
    let found = 0;
    for (const { card } of rows) {
      const fits = card.querySelector(".prompt").textContent.toLowerCase().includes(words);
      found += fits;
      card.hidden = !fits || (found > FIRST && !all);
      for (const data of card.querySelectorAll("data.by")) data.classList.remove("by");
      cell(card)?.classList.add("by");
    }
    gallery.replaceChildren(...rows.map(({ card }) => card));
    said.textContent = found === 1 ? "1 picture" : `${found} pictures`;
    more.hidden = all || found <= FIRST;
    more.textContent = `Show ${found - FIRST} more`;
  };
  key.addEventListener("change", () => { way.value = key.selectedOptions[0].dataset.better === "lower" ? "up" : "down"; show(); });
  way.addEventListener("change", show);
  find.addEventListener("input", show);
  more.addEventListener("click", () => {
    all = true;
    show();
    gallery.querySelectorAll(".scored:not([hidden])")[FIRST]?.focus();
  });
  show();
}
