"""Storage of vectors: the journal is the source of truth, and a Chroma collection is an index built from it.

vectors.py    the journal, a SQLite file: a record is stored, and counted by embed.py, once it is there
index.py      tasks on the collection, in child processes, because a torn collection can crash a process
store.py      keeps both in agreement. One path writes what the collection lacks: new records (also in the background of
              a run), changed metadata, removals. One path repairs: a torn or missing collection is rebuilt. After an
              interrupted write, all vectors are compared and differing ones are written again. A start leaves an
              unchanged collection closed. Ids that people deleted from the collection stay deleted; but if 100 or more
              of the newest are missing, a server has lost them
collection.py opens and reads the collection for all stages
server.py     the connection to a Chroma server, with timeouts and retries
migration.py  moves the journal of an earlier version into SQLite
model.py      compares and describes the models stored with collections
"""
