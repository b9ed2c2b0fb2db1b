// The reader of texts in a worker, so that the page stays alive whatever it reads.

// All that runs in the worker, as a script without imports.
export function workerSource() {
  const parts = [Heap, Tokenizer, readWeights, fromBfloat16, unpack, multiply, rmsNorm, rotate, weighted, softmax, choose, Model, reader];
  const listen = `
    let read;
    onmessage = ({ data }) => {
      if (read) return read(data).catch((error) => setTimeout(() => { throw error; }));
      read = reader(data, postMessage, 50);
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
        URL.revokeObjectURL(address);
        if (!result) worker.terminate();
        resolve(result);
      };
      worker.onmessage = () => settle(worker);
      worker.onerror = (event) => {
        event.preventDefault();
        settle(null);
      };
      setTimeout(settle, 10_000, null);
      worker.postMessage(buffer);
    } catch {
      resolve(null); // no workers here, or none from a Blob
    }
  });
}

// {ask(text), stop()}: `post` gets what `reader` finds. In a worker where there can be one, else in slices on the page.
export async function engine(buffer, post) {
  const worker = await startWorker(buffer);
  let read = worker ? (text) => worker.postMessage(text) : reader(buffer, post, 12);
  let last = "";
  if (worker) {
    worker.onmessage = ({ data }) => post(data);
    worker.onerror = (event) => {
      event.preventDefault();
      worker.terminate(); // out of memory, perhaps: go on without it
      read = reader(buffer, post, 12);
      read(last);
    };
  }
  return { ask: (text) => read((last = text)), stop: () => worker?.terminate() };
}
