"""`python -m liftlm` is `lift`; `accelerate launch -m liftlm …` starts it on several devices."""

from liftlm.cli import main

if __name__ == "__main__":
    main()
