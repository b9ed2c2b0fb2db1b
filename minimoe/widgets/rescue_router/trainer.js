// Training in a worker, so that the page stays alive; where there can be none, in slices on the page.

// A few steps as one: {steps, counts [E], dropped, loss}, sums over them.
function frameOf(step, settings, { frame, E }) {
  const all = { steps: frame, counts: new Array(E).fill(0), dropped: 0, loss: 0 };
  for (let i = 0; i < frame; i += 1) {
    const { counts, dropped, loss } = step(settings);
    counts.forEach((count, e) => (all.counts[e] += count));
    all.dropped += dropped;
    all.loss += loss;
  }
  return all;
}

// The frames of a whole training, whose settings change: phases [[how many frames, settings], ...].
export function filmed(text, sizes, phases) {
  const step = training(text, sizes);
  return phases.flatMap(([count, settings]) => Array.from({ length: count }, () => frameOf(step, settings, sizes)));
}

// Takes {alpha, speed, factor, running} whenever one of them changes; while running, posts frames, at no more than so
// many steps per second.
export function trainer(text, sizes, post) {
  const step = training(text, sizes);
  const now = {};
  let timer;
  function go() {
    const begun = performance.now();
    const frame = frameOf(step, now, sizes);
    timer = setTimeout(go, Math.max(1, (1000 * sizes.frame) / sizes.pace - (performance.now() - begun)));
    post(frame);
  }
  return (change) => {
    Object.assign(now, change);
    clearTimeout(timer);
    if (now.running) timer = setTimeout(go);
  };
}

// All that runs in the worker, as a script without imports.
export function workerSource() {
  const parts = [uniforms, normals, characters, begin, backward, times, back, normalise, unnormalise, softmaxed, adam, training, frameOf, trainer];
  return `${parts.join("\n")}\nlet tell;\nonmessage = ({ data }) => (tell ? tell(data) : (tell = trainer(...data, postMessage)));`;
}

// {tell(change), stop()}. `lost` is called if the worker fails, which it may do at its start or later.
function inWorker(text, sizes, post, lost) {
  const address = URL.createObjectURL(new Blob([workerSource()], { type: "text/javascript" }));
  const worker = new Worker(address);
  worker.onmessage = ({ data }) => post(data);
  worker.onerror = (event) => {
    event.preventDefault();
    worker.terminate();
    lost();
  };
  worker.postMessage([text, sizes]);
  return {
    tell: (change) => worker.postMessage(change),
    stop() {
      worker.terminate();
      URL.revokeObjectURL(address);
    },
  };
}

function onPage(text, sizes, post) {
  const tell = trainer(text, sizes, post);
  return { tell, stop: () => tell({ running: false }) };
}
