"""Running a student's notebook so that no cell can stop the others: nbgrader's Execute with a limit that holds."""

import time
from typing import Any

import nbformat
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbgrader.preprocessors import Execute
from traitlets import Float


class RunWithLimit(Execute):
    """Runs a notebook; a cell that takes too long, or takes the kernel with it, fails alone.

    nbgrader interrupts a cell that is late, and a loop that swallows the interrupt takes all later cells with it. Here
    the kernel is killed and the notebook run again in a new one, without that cell. Graded cells that are done are not
    repeated, and once `total` seconds are over, what has not run counts as failed.
    """

    total = Float(600.0, help="Seconds for a whole notebook.").tag(config=True)

    def preprocess(self, nb: Any, resources: Any = None, km: Any = None) -> tuple[Any, Any]:
        """Until every cell has run or has been given up."""
        self.done: dict[int, list[Any]] = {}
        self.interrupt_on_timeout = False
        self.extra_arguments = ["--HistoryManager.hist_file=:memory:", "--log-level=ERROR"]
        self.shutdown_kernel = "immediate"
        self.ends = time.monotonic() + self.total
        while True:
            try:
                nb, resources = super().preprocess(nb, resources, km)
                break
            except (CellTimeoutError, DeadKernelError) as error:
                late = isinstance(error, CellTimeoutError)
                text = f"stopped after {self.timeout} s" if late else "the kernel died"
                self.done[self.current] = [failure("TimeLimit" if late else "KernelDied", text)]
        for cell in nb.cells:
            # A warning is no mistake; nbgrader takes whatever is written to stderr for one.
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        return nb, resources

    def preprocess_cell(self, cell: Any, resources: Any, index: int) -> tuple[Any, Any]:
        """Run a cell, unless it has its outputs already or the time is over."""
        self.current = index
        if cell.cell_type == "code" and time.monotonic() > self.ends:
            self.done.setdefault(index, [failure("TimeLimit", f"{self.total:.0f} s were over")])
        if index in self.done:
            cell.outputs = self.done[index]
            return cell, resources
        cell, resources = super().preprocess_cell(cell, resources, index)
        if cell.metadata.get("nbgrader", {}).get("grade"):
            self.done[index] = cell.outputs
        return cell, resources


def failure(name: str, text: str) -> Any:
    """The output of a cell that failed."""
    return nbformat.v4.new_output("error", ename=name, evalue=text, traceback=[f"{name}: {text}"])
