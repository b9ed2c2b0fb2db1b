// A sparse next-character model by hand: forward pass, gradients and Adam, in double precision.
// Shapes: B tokens of a batch, S characters read, V letters, D hidden, F expert width, E experts. Matrices lie row by row.

// Text -> {letters, ids}: a character's id is its place among the sorted letters, as in minimoe.course.characters.
export function characters(text) {
  const all = [...text];
  const letters = [...new Set(all)].sort();
  const place = new Map(letters.map((letter, i) => [letter, i]));
  return { letters, ids: Uint16Array.from(all, (letter) => place.get(letter)) };
}

// Weights that repeat with the seed, of the shapes and spreads of the Python model.
export function begin({ V, S, D, F, E, seed, undecided }) {
  const normal = normals(seed);
  const made = (size, spread) => Float64Array.from({ length: size }, () => spread * normal());
  return {
    embedding: made(S * V * D, (4 * S) ** -0.5),
    head: made(V * D, D ** -0.5),
    router: made(E * D, undecided * D ** -0.5),
    gateUp: made(E * 2 * F * D, D ** -0.5), // [E, 2F, D]: F rows of the gate, F rows up
    down: made(E * D * F, D ** -0.5), // [E, D, F]
  };
}

// Contexts [B · S] and targets [B] -> {loss, balance, counts [E], dropped, gradients}. `loss` is of the prediction, in
// nats; the gradients are those of loss + alpha · balance, the Switch loss. An expert takes its first `places` tokens.
export function backward(weights, { V, S, D, F, E }, contexts, targets, { alpha = 0, places = Infinity } = {}) {
  const B = targets.length;
  const { embedding, head, router, gateUp, down } = weights;
  const gradients = Object.fromEntries(Object.entries(weights).map(([name, w]) => [name, new Float64Array(w.length)]));
  const [inputs, scales, probs, chosen, kept] = [new Float64Array(B * D), new Float64Array(B), new Float64Array(B * E), new Uint8Array(B), new Uint8Array(B)];
  const counts = new Array(E).fill(0);
  for (let t = 0; t < B; t += 1) {
    const x = inputs.subarray(t * D, (t + 1) * D);
    for (let s = 0; s < S; s += 1) {
      const row = (s * V + contexts[t * S + s]) * D;
      for (let d = 0; d < D; d += 1) x[d] += embedding[row + d];
    }
    scales[t] = normalise(x);
    const p = probs.subarray(t * E, (t + 1) * E);
    times(router, 0, E, x, p);
    softmaxed(p);
    let e = 0;
    for (let j = 1; j < E; j += 1) if (p[j] > p[e]) e = j;
    chosen[t] = e;
    counts[e] += 1;
    kept[t] = counts[e] <= places ? 1 : 0;
  }
  let [loss, balance] = [0, 0];
  const [gate, up, inner, inside] = [F, F, F, F].map((size) => new Float64Array(size));
  const [out, z, dz, dx, dout] = [D, D, D, D, D].map((size) => new Float64Array(size));
  const [q, ds, both] = [new Float64Array(V), new Float64Array(E), new Float64Array(2 * F)];
  for (let t = 0; t < B; t += 1) {
    const [x, p, e] = [inputs.subarray(t * D, (t + 1) * D), probs.subarray(t * E, (t + 1) * E), chosen[t]];
    const [first, second] = [e * 2 * F, e * D];
    z.set(x);
    if (kept[t]) {
      times(gateUp, first, F, x, gate);
      times(gateUp, first + F, F, x, up);
      for (let i = 0; i < F; i += 1) {
        inside[i] = 1 / (1 + Math.exp(-gate[i]));
        inner[i] = gate[i] * inside[i] * up[i];
      }
      times(down, second, D, inner, out);
      for (let d = 0; d < D; d += 1) z[d] += p[e] * out[d];
    }
    const scale = normalise(z);
    times(head, 0, V, z, q);
    softmaxed(q);
    loss -= Math.log(q[targets[t]]) / B;

    q[targets[t]] -= 1;
    for (let v = 0; v < V; v += 1) q[v] /= B;
    dz.fill(0);
    back(head, gradients.head, 0, V, z, q, dz);
    unnormalise(dz, z, scale);
    dx.set(dz);
    let felt = 0; // by the probability of the chosen expert
    if (kept[t]) {
      for (let d = 0; d < D; d += 1) {
        felt += dz[d] * out[d];
        dout[d] = p[e] * dz[d];
      }
      const du = both.subarray(0, F).fill(0); // then of the gate, in the same place
      back(down, gradients.down, second, D, inner, dout, du);
      for (let i = 0; i < F; i += 1) {
        both[F + i] = du[i] * gate[i] * inside[i];
        both[i] = du[i] * up[i] * inside[i] * (1 + gate[i] * (1 - inside[i]));
      }
      back(gateUp, gradients.gateUp, first, 2 * F, x, both, dx);
    }
    let mean = 0; // load, weighted with this token's probabilities
    for (let j = 0; j < E; j += 1) mean += (p[j] * counts[j]) / B;
    balance += (E * mean) / B;
    for (let j = 0; j < E; j += 1) ds[j] = p[j] * (felt * ((j === e ? 1 : 0) - p[e]) + (alpha * E * (counts[j] / B - mean)) / B);
    back(router, gradients.router, 0, E, x, ds, dx);
    unnormalise(dx, x, scales[t]);
    for (let s = 0; s < S; s += 1) {
      const row = (s * V + contexts[t * S + s]) * D;
      for (let d = 0; d < D; d += 1) gradients.embedding[row + d] += dx[d];
    }
  }
  return { loss, balance, counts, dropped: B - kept.reduce((a, b) => a + b, 0), gradients };
}

// out = rows [from, from + count) of a matrix times x.
function times(matrix, from, count, x, out) {
  const D = x.length;
  for (let i = 0; i < count; i += 1) {
    let total = 0;
    for (let d = 0, at = (from + i) * D; d < D; d += 1, at += 1) total += matrix[at] * x[d];
    out[i] = total;
  }
}

// Backward through `times`: adds to the matrix's gradient and to dx what dout asks for.
function back(matrix, gradient, from, count, x, dout, dx) {
  const D = x.length;
  for (let i = 0; i < count; i += 1) {
    const g = dout[i];
    for (let d = 0, at = (from + i) * D; d < D; d += 1, at += 1) {
      gradient[at] += g * x[d];
      dx[d] += g * matrix[at];
    }
  }
}

// x /= its root mean square, in place; returns what it was multiplied with. And backward: dx, in place.
function normalise(x) {
  let squares = 0;
  for (let d = 0; d < x.length; d += 1) squares += x[d] * x[d];
  const scale = (squares / x.length + Number.EPSILON) ** -0.5;
  for (let d = 0; d < x.length; d += 1) x[d] *= scale;
  return scale;
}

function unnormalise(dx, x, scale) {
  let along = 0;
  for (let d = 0; d < x.length; d += 1) along += dx[d] * x[d];
  for (let d = 0; d < x.length; d += 1) dx[d] = scale * (dx[d] - (x[d] * along) / x.length);
}

function softmaxed(x) {
  let [most, total] = [-Infinity, 0];
  for (let i = 0; i < x.length; i += 1) if (x[i] > most) most = x[i];
  for (let i = 0; i < x.length; i += 1) total += x[i] = Math.exp(x[i] - most);
  for (let i = 0; i < x.length; i += 1) x[i] /= total;
}

// One step of Adam, in place, with PyTorch's defaults; `rates` by name of the weights. `moments` begins as {step: 0}.
export function adam(weights, gradients, moments, rates) {
  moments.step += 1;
  const [one, two] = [1 - 0.9 ** moments.step, 1 - 0.999 ** moments.step];
  for (const [name, w] of Object.entries(weights)) {
    const [m, v] = (moments[name] ??= [new Float64Array(w.length), new Float64Array(w.length)]);
    const g = gradients[name];
    for (let i = 0; i < w.length; i += 1) {
      m[i] += 0.1 * (g[i] - m[i]);
      v[i] = 0.999 * v[i] + 0.001 * g[i] * g[i];
      w[i] -= ((rates[name] / one) * m[i]) / (Math.sqrt(v[i] / two) + 1e-8);
    }
  }
}

// Training of a text, step by step: returns a function of what the reader has set, which does one step on B random
// places of the text and returns its loss, the assignments of each expert before any drop, and how many were dropped.
export function training(text, sizes) {
  const { letters, ids } = characters(text);
  const shape = { ...sizes, V: letters.length };
  const { B, S, E, rate, seed } = sizes;
  const [weights, moments, uniform] = [begin(shape), { step: 0 }, uniforms(seed + 1)];
  const [contexts, targets] = [new Uint16Array(B * S), new Uint16Array(B)];
  return ({ alpha, speed, factor }) => {
    for (let t = 0; t < B; t += 1) {
      const start = Math.floor(uniform() * (ids.length - S));
      contexts.set(ids.subarray(start, start + S), t * S);
      targets[t] = ids[start + S];
    }
    const places = factor ? Math.ceil((factor * B) / E - 1e-9) : Infinity;
    const { gradients, ...seen } = backward(weights, shape, contexts, targets, { alpha, places });
    const rates = Object.fromEntries(Object.keys(weights).map((name) => [name, name === "router" ? speed * rate : rate]));
    adam(weights, gradients, moments, rates);
    return seen;
  };
}
