"""Studies: experiments on LIFT's claims, one command each, with intervals and a verdict. `lift study NAME`."""
