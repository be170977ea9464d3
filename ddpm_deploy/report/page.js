"use strict";
// Steps through the frames; without it the first and the last are on the page.
(() => {
  const scrubber = document.getElementById("scrubber");
  if (!scrubber) return;
  const slider = document.getElementById("step");
  const says = document.getElementById("step-says");
  const frames = [...document.querySelectorAll(".frame")];
  const show = () => {
    const chosen = frames[Number(slider.value)];
    for (const frame of frames) frame.hidden = frame !== chosen;
    says.textContent = chosen.dataset.says;
    slider.setAttribute("aria-valuetext", chosen.dataset.says);
  };
  slider.addEventListener("input", show);
  scrubber.hidden = false;
  document.getElementById("without-script").hidden = true;
  show();
})();
