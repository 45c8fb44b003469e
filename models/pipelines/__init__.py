"""One file a family with its `EntryClass`; the registry finds it by itself. Free of torch."""
