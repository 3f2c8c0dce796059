from flashpack.cli import main

main()
