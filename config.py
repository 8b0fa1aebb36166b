"""Every setting of every stage: constants only, each of them also a flag of the scripts that use it.

The comment behind or above a constant is also its line in `--help`. Precedence: the flag, else this file.
Relative paths are relative to the folder in which a script is started.
"""

# --- the list, and where what becomes of it is stored -----------------------------------------------------------------
FORMATTED_DATA_PATH = "data/formatted.json"  # input: JSON list of {"url": ..., metadata}; .jsonl: one a line, streamed
ID_FIELD = "url"  # field that identifies an item: id = uuid5(NAMESPACE_URL, its value); changing it changes every id
CHROMADB_PATH = "data/chroma"  # folder of the embedded Chroma, and of the journal; deleting it starts afresh
COLLECTION_NAME = "images"  # collection in it: 3 to 512 characters of a-z, A-Z, 0-9, '.', '_', '-'
CHROMA_SERVER_URL = ""  # http(s)://host:port of a Chroma server that holds the collection; "" = embedded
CHROMA_SERVER_HEADERS_ENV = ""  # environment variable with headers for it, as JSON, such as a proxy's token; "" = none
FAILED_DATA_PATH = "data/failed.json"  # what could not be embedded, and why: [{"index", "url", "reason", "detail"}]
IMAGE_CACHE_DIR_PATH = "data/images"  # downloaded originals, reused by ann_dirrify.py; "" keeps none
IMAGE_CACHE_MAX_BYTES = 20_000_000_000  # caching stops there, or with less than 10% of the disk free; embedding goes on
LOGS_DIR_PATH = "data/logs"  # a log file per run; "" writes none

# --- the model --------------------------------------------------------------------------------------------------------
CLIP_MODEL_NAME = "ViT-B-32"  # an open_clip model name, 'hf-hub:ORG/NAME' or 'local-dir:PATH'
CLIP_PRETRAINED = "laion2b_s34b_b79k"  # open_clip tag, or path of a checkpoint; ignored for hf-hub: and local-dir:
DEVICE = "auto"  # auto (cuda, else mps, else cpu), or a torch device such as cpu or cuda:1
PRECISION = "auto"  # auto (the fastest that stays true to fp32), fp32, bf16 or fp16
BATCH_SIZE = 32  # images per forward pass; 32 is best on CPUs, GPUs like 256 and more

# --- Ray, past one machine or GPU: pip install "ray[data]" -----------------------------------------------------------
EMBED_RAY_ADDRESS = ""  # "" = this process; local starts Ray here, auto or ray://host:port joins a cluster
EMBED_RAY_ACTORS = 0  # 0 = one per GPU, or, without GPUs, one per EMBED_RAY_CPUS_PER_ACTOR cores
EMBED_RAY_CPUS_PER_ACTOR = 1  # cores of an actor where there are no GPUs; where there are, of its decoders

# --- the web ----------------------------------------------------------------------------------------------------------
DOWNLOAD_WORKERS = 128  # concurrent downloads; each brings 0.6 images/s of the web; hundreds overload name servers
DOWNLOAD_WORKERS_PER_HOST = 0  # of these to one host; 0 = no limit of its own
DOWNLOAD_TIMEOUT_S = 15  # total deadline of one attempt, seconds
DOWNLOAD_ATTEMPTS = 2  # tries per image; one retry brings most of what retrying can bring
DOWNLOAD_MAX_BYTES = 50_000_000  # larger bodies are refused, bytes
DOWNLOAD_ALLOW_LOCAL = False  # allow what the list names on this machine or network: private addresses, file://, paths
DOWNLOAD_RESPECT_NOAI = True  # refuse images served with X-Robots-Tag noai or noimageai
MAX_IMAGE_PIXELS = 100_000_000  # larger images are refused before decoding, width x height

# --- annotation -------------------------------------------------------------------------------------------------------
ANNOTATED_DATA_PATH = "data/annotated.json"  # output: JSON list of {"pos": [ids], "neg": [ids]}
ANN_SAMPLER_NAME = "random"  # which images become main images: a name from samplers.py
ANN_SAMPLER_CFG: dict = {}  # options of that sampler, as JSON
ANN_SEED = 0  # seed of the sampler: same seed and data, same directories
ANN_DIRRIFY_DIR_PATH = "data/dirrify"  # folder that ann_dirrify.py creates and the reviewer opens
ANN_DIRRIFY_NDIRS = 100  # directories to generate
ANN_DIRRIFY_NNEAREST = 20  # nearest images beside the main one in a directory
ANN_DIRRIFY_MAX_SIMILARITY = 1.0  # cosine; a neighbor nearer to one listed before gives way to the next; 1.0 = off
ANN_DIRRIFY_WHERE: dict = {}  # main images are chosen among these: Chroma's `where` on metadata, as JSON; {} = all
ANN_DIRRIFY_NEIGHBORS_WHERE: dict = {}  # and their neighbors among these
ANN_DIRRIFY_SHOW_JUDGED = False  # show pairs again that a record has judged, and main images that were discarded
ANN_DIRRIFY_EXCLUDE_DIRS: list = []  # folders of other reviewers: what is shown there becomes no main image
ANN_HISTORY_PATH = "data/history.jsonl"  # what was shown and decided, one JSON object a line, for reports; "" = none

# --- training and judging ---------------------------------------------------------------------------------------------
ANN_EXPORT_DIR_PATH = "data/export"  # folder for {format}.{split}.{extension}, and pairs.csv
ANN_EXPORT_FORMAT = "triplets"  # pairs, triplets, flagembedding, reranking or qrels
ANN_EXPORT_VALUE = "path"  # what stands for an image: path (in the image cache), url or id; pairs and qrels: always id
ANN_EXPORT_SPLIT: dict = {"train": 0.8, "validation": 0.1, "test": 0.1}  # share of the groups, as JSON; the sum is 1
ANN_EXPORT_SEED = 0  # seed of the split: same seed and data, same files
ANN_EXPORT_NEAR_DUPLICATE = 0.98  # cosine; images this similar are never on both sides of a split; above 1 = off
ANN_REPORT_DIR_PATH = "data/report"  # folder for report.html, report.json and thumbnails; can be moved or zipped
