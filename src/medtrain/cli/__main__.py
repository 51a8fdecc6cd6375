"""`python -m medtrain.cli`: the same door without the installed script."""

from medtrain.cli import main

main()
