from tokdiv.cli import main

main()
