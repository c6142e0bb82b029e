"""4-bit weights: packing, unpacking and the frozen linear layer that uses them."""

import logging

# an advice to install a kernel of the hub, at every import of a processor's operators; all works without it
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.msg)
