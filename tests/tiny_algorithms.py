"""The algorithms and the ablations of the hierarchy, as overrides of the tiny configuration."""

OWN_SIZE = {"block_size": None}  # the algorithm has a block size of its own
ALGORITHMS = {
    "hier": {},
    "bd3lm": {"algorithm": "bd3lm"},
    "mdlm": {"algorithm": "mdlm", **OWN_SIZE},
    "sedd": {"algorithm": "sedd", **OWN_SIZE},
    "ar": {"algorithm": "ar", **OWN_SIZE},
}
ABLATIONS = {
    "block by block, with the mask": {},
    "block by block, without": {"hierarchical_mask": False},
    "joint, with the mask": {"joint": True, **OWN_SIZE},
    "joint, without": {"joint": True, "hierarchical_mask": False, **OWN_SIZE},
}
ALL = ALGORITHMS | ABLATIONS
