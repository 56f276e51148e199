"use strict";
// The table beside it says the same at some thresholds; without this script it is all there is.
const part = document.getElementById("flags");
const all = JSON.parse(part.dataset.flags);
const form = part.querySelector("form");
const [detector, threshold] = [form.elements.detector, form.elements.threshold];
const count = (value) => value.toLocaleString("en").replaceAll(",", "\u202f");
const percent = (value) => (100 * value).toFixed(1) + "\u202f%";

function tell() {
  const one = all[detector.value];
  const place = Number(threshold.value);
  const [level, flagged, doubtful] = [one.levels[place], one.flagged[place], one.doubtful[place]];
  const share = flagged ? doubtful / flagged : 0;
  form.elements.flagged.value = count(flagged);
  form.elements.doubtful.value = flagged ? count(doubtful) + " (" + percent(share) + ")" : "–";
  form.elements.novel.value = count(flagged - doubtful);
  form.elements.level.value = "p ≤ " + level;
  part.querySelector(".share i").style.width = (flagged ? 100 * (1 - share) : 0) + "%";
  threshold.setAttribute(
    "aria-valuetext",
    "p at most " + level + ": " + flagged + " flagged, at most " + doubtful + " of them false",
  );
}

function choose() {
  const one = all[detector.value];
  threshold.max = one.levels.length - 1;
  threshold.value = one.start;
  tell();
}

form.addEventListener("submit", (event) => event.preventDefault());
detector.addEventListener("change", choose);
threshold.addEventListener("input", tell);
form.hidden = false;
choose();
