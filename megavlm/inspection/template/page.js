"use strict";
// What the pointer or the keyboard is on lights up what belongs to it: a token the tiles that it sees, a tile the
// tokens that see it. Facts stand beside each sample as JSON (megavlm/inspection/card_maker.py: facts_of).
(() => {
  const TOKENS = ".tokens i, .tokens b";

  /** The values that hold at a place, of a list of changes [place, ...values]. */
  function at(changes, place) {
    let low = 0;
    let high = changes.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (changes[middle][0] <= place) low = middle;
      else high = middle - 1;
    }
    return changes[low].slice(1);
  }

  /** One sample of the page. */
  class Sample {
    constructor(article) {
      this.article = article;
      this.facts = JSON.parse(article.querySelector("script.facts").textContent);
      this.box = article.querySelector(".tokens");
      this.details = article.querySelector(".details");
      this.tokens = [...article.querySelectorAll(TOKENS)];
      this.starts = [];
      let place = 0;
      for (const token of this.tokens) {
        this.starts.push(place);
        place += Number(token.dataset.n || 1);
      }
      this.index = new Map(this.tokens.map((token, number) => [token, number]));
      this.tiles = [...article.querySelectorAll("[data-tile]:not(b)")];
      this.pinned = null;
    }

    last(number) {
      return this.starts[number] + Number(this.tokens[number].dataset.n || 1) - 1;
    }

    /** How a position sees a tile: "cross" or "self" attention; "" where it does not. */
    sees(place, tile) {
      const [context, first, stop] = this.facts.tiles[tile];
      if (!context) return first < stop && first <= place ? "self" : "";
      const [begin, end] = at(this.facts.visible, place);
      return begin <= tile && tile < end ? "cross" : "";
    }

    clear() {
      for (const one of this.article.querySelectorAll(".lit, .now")) one.classList.remove("lit", "now");
    }

    say(text) {
      this.details.textContent = text;
    }

    showToken(number) {
      this.clear();
      const token = this.tokens[number];
      const last = this.last(number);
      token.classList.add("now");
      const ways = new Map();
      for (const [tile] of this.facts.tiles.entries()) {
        const way = this.sees(last, tile);
        if (way) ways.set(way, [...(ways.get(way) || []), tile]);
        for (const one of this.tiles) {
          if (way && Number(one.dataset.tile) === tile) one.classList.add("lit");
        }
      }
      const seen = [...ways].map(([way, tiles]) => `${ranges(tiles)} by ${way}-attention`).join("; ");
      this.say([...this.about(number), seen ? `sees tiles ${seen}` : "sees no tile"].join(" \u00b7 "));
    }

    about(number) {
      const token = this.tokens[number];
      const [first, last] = [this.starts[number], this.last(number)];
      const run = token.parentElement.dataset;
      const position = this.facts.position + first;
      const id = `id ${this.facts.ids[first]}`;
      const said = [first === last ? `position ${position}` : `positions ${position}-${position + last - first}`, id];
      if (first === last) said.push(`"${token.textContent}"`);
      said.push(run.message === undefined ? run.category : `${run.category}, message ${run.message}`);
      if (run.trained !== undefined) said.push("trained");
      for (let place = first; place <= last; place += 1) {
        const [weight] = at(this.facts.weights, place);
        const label = this.facts.labels[place];
        if (weight > 0) said.push(`label ${label} "${this.textAt(place + 1)}", loss weight ${weight}`);
        else if (first === last) said.push("no label, loss weight 0");
      }
      return said;
    }

    textAt(place) {
      const number = this.starts.indexOf(place);
      return number < 0 ? "" : this.tokens[number].textContent;
    }

    showTile(tile) {
      this.clear();
      let count = 0;
      for (const [number, token] of this.tokens.entries()) {
        if (this.sees(this.last(number), tile)) token.classList.add("lit");
      }
      for (let place = 0; place < this.facts.ids.length; place += 1) count += this.sees(place, tile) ? 1 : 0;
      for (const one of this.tiles) {
        if (Number(one.dataset.tile) === tile) one.classList.add("now");
      }
      const [context, first, stop] = this.facts.tiles[tile];
      const where = context
        ? `${context} tokens in the context of cross-attention`
        : `${stop - first} image tokens at positions ${first}-${stop - 1}`;
      this.say(`tile ${tile} \u00b7 ${where} \u00b7 seen by ${count} of ${this.facts.ids.length} positions`);
    }

    show(what) {
      if (!what) {
        this.clear();
        this.say("");
      } else if (what.tile !== undefined) {
        this.showTile(what.tile);
      } else {
        this.showToken(what.token);
      }
    }

    pin(what) {
      this.pinned = what;
      this.show(what);
    }

    /** What an element of the sample stands for; null: nothing. */
    meant(element) {
      const token = element.closest(TOKENS);
      if (token) return { token: this.index.get(token) };
      const tile = element.closest("[data-tile]");
      return tile ? { tile: Number(tile.dataset.tile) } : null;
    }

    key(event) {
      const number = this.pinned && this.pinned.token !== undefined ? this.pinned.token : -1;
      const most = this.tokens.length - 1;
      const moves = { ArrowRight: number + 1, ArrowLeft: Math.max(0, number - 1), Home: 0, End: most };
      if (event.key === "Escape") {
        this.pin(null);
      } else if (event.key in moves && this.tokens.length) {
        event.preventDefault();
        this.pin({ token: Math.min(most, moves[event.key]) });
        this.tokens[this.pinned.token].scrollIntoView({ block: "nearest" });
      }
    }
  }

  /** "0-3, 7" of numbers in order. */
  function ranges(numbers) {
    const found = [];
    for (const number of numbers) {
      const last = found[found.length - 1];
      if (last && last[1] === number - 1) last[1] = number;
      else found.push([number, number]);
    }
    return found.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join(", ");
  }

  const samples = new Map();

  function sampleOf(target) {
    const article = target instanceof Element ? target.closest("article.used") : null;
    if (article && !samples.has(article)) samples.set(article, new Sample(article));
    return samples.get(article);
  }

  document.addEventListener("mouseover", (event) => {
    const sample = sampleOf(event.target);
    if (sample) sample.show(sample.meant(event.target) || sample.pinned);
  });
  document.addEventListener("mouseout", (event) => {
    const sample = sampleOf(event.target);
    if (sample && sampleOf(event.relatedTarget) !== sample) sample.show(sample.pinned);
  });
  document.addEventListener("click", (event) => {
    const sample = sampleOf(event.target);
    if (!sample) return;
    const meant = sample.meant(event.target);
    if (meant) sample.pin(JSON.stringify(meant) === JSON.stringify(sample.pinned) ? null : meant);
  });
  document.addEventListener("focusin", (event) => {
    const sample = sampleOf(event.target);
    const tile = sample && event.target.closest("button[data-tile]");
    if (tile) sample.show({ tile: Number(tile.dataset.tile) });
  });
  document.addEventListener("focusout", (event) => {
    const sample = sampleOf(event.target);
    if (sample) sample.show(sample.pinned);
  });
  document.addEventListener("keydown", (event) => {
    const sample = sampleOf(event.target);
    if (sample && (event.target === sample.box || event.key === "Escape")) sample.key(event);
  });

  const filter = document.getElementById("filter");
  function applyFilter() {
    const chosen = (name) => new Set([...filter.querySelectorAll(`[name=${name}]:checked`)].map((box) => box.value));
    const [sources, kinds] = [chosen("source"), chosen("kind")];
    let count = 0;
    const all = document.querySelectorAll("[data-source]");
    for (const one of all) {
      one.hidden = !(sources.has(one.dataset.source) && kinds.has(one.dataset.kind));
      if (one.matches(".sample") && !one.hidden) count += 1;
    }
    document.getElementById("num-shown").textContent = count;
  }
  if (filter) {
    filter.hidden = false;
    filter.addEventListener("change", applyFilter);
    applyFilter(); // a browser that comes back to the page has kept the boxes
  }
})();
