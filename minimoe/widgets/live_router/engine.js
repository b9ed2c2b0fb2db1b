// The reader of texts in a worker, so that the page stays alive whatever it reads.

const STARTS = 10_000; // milliseconds in which a worker has to read the weights
const ANSWERS = 5_000; // and in which it has to give a sign of life while it reads a text

// All that runs in the worker, as a script without imports.
export function workerSource() {
  const parts = [Heap, Tokenizer, readWeights, fromBfloat16, unpack, multiply, rmsNorm, rotate, weighted, softmax, choose, Model, reader];
  const listen = `
    let read;
    onmessage = ({ data }) => {
      if (read) return read(data).catch((error) => setTimeout(() => { throw error; }));
      read = reader(data, postMessage, 50, () => postMessage("reading"));
      postMessage("ready");
    };`;
  return parts.map(String).join("\n") + listen;
}

// Resolves to a worker that has read the weights, or to null where the page may not have one.
function startWorker(buffer) {
  return new Promise((resolve) => {
    try {
      const address = URL.createObjectURL(new Blob([workerSource()], { type: "text/javascript" }));
      const worker = new Worker(address);
      const settle = (result) => {
        clearTimeout(waiting);
        URL.revokeObjectURL(address);
        if (!result) worker.terminate();
        resolve(result);
      };
      const waiting = setTimeout(settle, STARTS, null);
      worker.onmessage = () => settle(worker);
      worker.onerror = (event) => {
        event.preventDefault();
        settle(null);
      };
      worker.postMessage(buffer);
    } catch {
      resolve(null); // no workers here, or none from a Blob
    }
  });
}

// {ask({text, only}), stop()}: `post` gets what `reader` finds. In a worker where there can be one, else in slices on the page.
// A worker that was ended from outside fires no event: `lost` is called when it has not answered for some seconds.
export async function engine(buffer, post, lost) {
  const worker = await startWorker(buffer);
  let read = worker ? ask : reader(buffer, post, 12);
  let [last, waiting] = [];

  function ask(request) {
    wait();
    worker.postMessage(request);
  }

  function wait() {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      stop();
      lost();
    }, ANSWERS);
  }

  function stop() {
    clearTimeout(waiting);
    worker?.terminate();
    read = () => {};
  }

  if (worker) {
    worker.onmessage = ({ data }) => {
      if (data === "reading") return wait();
      clearTimeout(waiting);
      post(data);
    };
    worker.onerror = (event) => {
      event.preventDefault();
      stop(); // out of memory, perhaps: go on without it
      read = reader(buffer, post, 12);
      read(last);
    };
  }
  return { ask: (request) => read((last = request)), stop };
}
