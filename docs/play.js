// Behind the constant PLAY, which play.py writes: buttons for pairs and inputs, a slider a private dimension, one canvas.
(() => {
  const root = document.getElementById("play"), sprite = new Image(), n = PLAY.steps.length;
  const classes = PLAY.classes.length, chosen = { pair: 0, input: 3 };
  const sliders = [...root.querySelectorAll("label")];

  function draw(canvas, input, column) {
    const s = PLAY.side, brush = canvas.getContext("2d");
    canvas.width = canvas.height = s;
    brush.drawImage(sprite, column * s, (chosen.pair * classes + input) * s, s, s, 0, 0, s, s);
  }
  function show() {
    const dims = PLAY.pairs[chosen.pair].private;
    let place = 0;
    sliders.forEach((label, i) => {
      const at = label.querySelector("input").value;
      label.hidden = i >= dims.length;
      label.querySelector("span").textContent = `private ${dims[i]}: ${PLAY.steps[at].toFixed(1).replace("-", "−")}`;
      if (i < dims.length) place = place * n + +at;
    });
    root.querySelectorAll("button").forEach(b => b.setAttribute("aria-pressed", chosen[b.dataset.of] == b.dataset.value));
    root.querySelectorAll("button canvas").forEach((canvas, input) => draw(canvas, input, 0));
    draw(root.querySelector("#drawn"), chosen.input, 1 + place);
  }
  function button(of, value, inside) {
    const made = document.createElement("button");
    made.dataset.of = of;
    made.dataset.value = value;
    made.append(inside);
    made.onclick = () => { chosen[of] = value; show(); };
    root.querySelector("." + of).append(made);
    return made;
  }
  PLAY.pairs.forEach((pair, i) => button("pair", i, pair.title));
  PLAY.classes.forEach((label, i) => { button("input", i, document.createElement("canvas")).ariaLabel = `a ${label}`; });
  sliders.forEach(label => { label.querySelector("input").oninput = show; });
  sprite.onload = show;
  sprite.src = new URL("play.webp", document.currentScript.src);
})();
