# SPDX-License-Identifier: Apache-2.0
"""What a Python program needs of the standard library, compiled: stdlib.py PROGRAM FOLDER.

Prints a line for each file: where it belongs, a tab, and where it is. The program is asked for its help, so that what
reading a command line needs is there, too.
"""

import contextlib
import importlib.util
import io
import os
import py_compile
import sys

program, folder = sys.argv[1:]
sys.argv = [program, "--help"]
sys.dont_write_bytecode = True
spec = importlib.util.spec_from_file_location("__main__", program)
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
for source in sorted(files - {None, program, __file__}):
    if not source.endswith(".py"):
        print(f"{source}\t{source}")
        continue
    compiled = folder + source + "c"
    os.makedirs(os.path.dirname(compiled), exist_ok=True)
    # Nothing in the image says when a source was changed.
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(source, compiled, doraise=True, invalidation_mode=mode)
    print(f"{source}c\t{compiled}")
