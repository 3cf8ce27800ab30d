"""The same model, text, bits and group size through other toolkits, measured beside ours.

    python -m eval.peers --bits 4 3 2 --group 64 --prune --out runs/peers

Each toolkit has an environment of its own (``requirements/``: their pins exclude one another) and
an adapter of a few lines that runs there, in a process of its own (``child.py``); ours goes through
the same. All get the same calibration tokens, leave embeddings and head alone (one that does not
has failed), and are judged by the same code on the same held-out windows, from dense copies of
their weights. Bytes are those of the files that each toolkit itself writes, with zero-points where
it stores them. Seconds are those of compressing a model that is loaded, save that ours reads it
too; they compare only if nothing else runs. On one thread of a busy machine, compare what its
processors spent.

Every job is a line in ``results.jsonl``. One that is there is not run again, unless ``--redo``
names its toolkit, or ``--retry`` is given and it failed.
"""
