"""A page for the browser on which a plan and its execution are denoised live; needs the extra `[demo]`."""
