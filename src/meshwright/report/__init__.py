"""Shows plans and timelines to people: terminal tables, HTML pages, traces."""
