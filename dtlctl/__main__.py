from dtlctl.cli.app import main

main()
