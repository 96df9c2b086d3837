from dtlctl.cli import main

main()
