"""A small mixed cluster emulated on one Linux machine: namespaces, shaped links, paced devices."""
