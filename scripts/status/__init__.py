"""The start-up status service: from rank files and /proc to a log line, a page, JSON, metrics and probe answers.

rank_files -> processes -> movement -> judge -> collector -> text, page, metrics, server
"""
