"""The only place that knows torch."""

import logging

# bitsandbytes warns at each start that an optional kernel for inference is not installed. Every process that trains or
# evaluates comes through here before it loads it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
