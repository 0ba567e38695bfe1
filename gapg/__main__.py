from gapg.cli import main

if __name__ == "__main__":  # a spawned child imports this module, and must not start a run of its own
    main()
