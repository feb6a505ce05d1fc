"""Names of the logical axes of arrays.

The model says which axes its parameters have; `partition.py` says which axis of the device mesh may split each.
"""

BATCH, SEQ = "batch", "seq"
VOCAB, POSITIONS, EMBD, HEADS, MLP = "vocab", "positions", "embd", "heads", "mlp"
