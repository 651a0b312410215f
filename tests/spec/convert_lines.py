"""Invocations of convert, by what they are about: the cases of `test_convert`.

The files are those of `support.disks`.
"""

from __future__ import annotations

from support.twins import lines

TO_RAW = r"""
## sources of every kind
convert mixed.raw out
convert -f raw -O raw mixed.raw out
convert sectors.raw out
convert zeros.raw out
convert holes.raw out
convert odd.raw out
convert tiny.raw out
convert empty.raw out
convert big.raw out
convert plain.q out
convert packed.q out
convert zstd.q out
convert v2.q out
convert c512.q out
convert c4k.q out
convert c2m.q out
convert ext.q out
convert rc1.q out
convert rc64.q out
convert lazy.q out
convert pre.q out
convert data.q out
convert dataraw.q out
convert marked.q out
convert stale.q out
convert odd.q out
convert zero.q out
convert -f raw packed.q out
convert -f raw zero.q out
## chains
convert mid.q out
convert top.q out
convert short.q out
convert long.q out
convert packed-over.q out
convert c512-over.q out
convert c2m-over.q out
convert ext-over.q out
convert sub/over.q out
convert mixed.raw sub/../out
## several sources
convert mixed.raw plain.q out
convert odd.raw tiny.raw odd.raw out
convert empty.raw tiny.raw zero.q mixed.raw out
convert top.q long.q short.q out
convert odd.q odd.q out
convert mixed.raw mixed.raw out
convert -f raw plain.q mixed.raw out
## descriptions of sources
convert --image-opts driver=qcow2,file.filename=plain.q out
convert --image-opts driver=raw,offset=64k,size=128k,file.filename=mixed.raw out
convert --image-opts file.filename=packed.q out
convert --image-opts driver=qcow2,backing.driver=raw,backing.file.filename=mixed.raw,file.filename=short.q out
convert 'json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"sectors.raw"}}' out
convert 'json:{"driver":"qcow2","file":{"driver":"file","filename":"top.q"}}' out
convert -U plain.q out
convert file:mixed.raw file:out
"""

SPARSE = r"""
convert -S 0 mixed.raw out
convert -S 0 holes.raw out
convert -S 0 plain.q out
convert -S 0 packed.q out
convert -S 0 top.q out
convert -S 0 odd.raw out
convert -S 0 tiny.raw out
convert -S 0 empty.raw out
convert -S 512 sectors.raw out
convert -S 1k sectors.raw out
convert -S 1536 sectors.raw out
convert -S 4k sectors.raw out
convert -S 20k sectors.raw out
convert -S 64k sectors.raw out
convert -S 64k zeros.raw out
convert -S 1M zeros.raw out
convert -S 16M zeros.raw out
convert -S 512 zeros.raw out
convert -S 0x1000 sectors.raw out
convert -S 0 -O qcow2 mixed.raw out
convert -S 0 -O qcow2 holes.raw out
convert -S 0 -O qcow2 top.q out
convert -S 0 -c -O qcow2 mixed.raw out
convert -S 512 -O qcow2 -o cluster_size=512 sectors.raw out
convert -S 1k -O qcow2 -o cluster_size=512 sectors.raw out
convert -S 4k -O qcow2 -o cluster_size=512 sectors.raw out
convert -S 1536 -O qcow2 -o cluster_size=512 sectors.raw out
convert -S 64k -O qcow2 -o cluster_size=512 sectors.raw out
convert -S 512 -O qcow2 -o cluster_size=4k sectors.raw out
convert -S 64k -O qcow2 -o cluster_size=4k zeros.raw out
convert -S 512 -O qcow2 -o extended_l2=on sectors.raw out
convert -S 4k -O qcow2 -o extended_l2=on sectors.raw out
convert -S 0 -O qcow2 -o extended_l2=on sectors.raw out
convert -S 0 -B base.raw -F raw -O qcow2 short.q out
"""

TO_QCOW2 = r"""
convert -O qcow2 mixed.raw out
convert -O qcow2 sectors.raw out
convert -O qcow2 zeros.raw out
convert -O qcow2 holes.raw out
convert -O qcow2 odd.raw out
convert -O qcow2 tiny.raw out
convert -O qcow2 empty.raw out
convert -O qcow2 big.raw out
convert -O qcow2 plain.q out
convert -O qcow2 packed.q out
convert -O qcow2 ext.q out
convert -O qcow2 c512.q out
convert -O qcow2 c2m.q out
convert -O qcow2 pre.q out
convert -O qcow2 data.q out
convert -O qcow2 odd.q out
convert -O qcow2 zero.q out
convert -O qcow2 top.q out
convert -O qcow2 short.q out
convert -O qcow2 long.q out
convert -O qcow2 ext-over.q out
convert -O qcow2 c2m-over.q out
convert -O qcow2 mixed.raw odd.raw top.q out
## creation options
convert -O qcow2 -o cluster_size=512 mixed.raw out
convert -O qcow2 -o cluster_size=1k sectors.raw out
convert -O qcow2 -o cluster_size=4k plain.q out
convert -O qcow2 -o cluster_size=2M big.raw out
convert -O qcow2 -o cluster_size=2M odd.raw out
convert -O qcow2 -o refcount_bits=1 mixed.raw out
convert -O qcow2 -o refcount_bits=2,cluster_size=512 mixed.raw out
convert -O qcow2 -o refcount_bits=4 mixed.raw out
convert -O qcow2 -o refcount_bits=8 mixed.raw out
convert -O qcow2 -o refcount_bits=32 mixed.raw out
convert -O qcow2 -o refcount_bits=64,cluster_size=512 big.raw out
convert -O qcow2 -o compat=0.10 mixed.raw out
convert -O qcow2 -o compat=v2 top.q out
convert -O qcow2 -o compat=1.1 mixed.raw out
convert -O qcow2 -o extended_l2=on mixed.raw out
convert -O qcow2 -o extended_l2=on sectors.raw out
convert -O qcow2 -o extended_l2=on,cluster_size=16k sectors.raw out
convert -O qcow2 -o extended_l2=on,cluster_size=2M big.raw out
convert -O qcow2 -o lazy_refcounts=on mixed.raw out
convert -O qcow2 -o lazy_refcounts mixed.raw out
convert -O qcow2 -o data_file=out.data mixed.raw out
convert -O qcow2 -o data_file=out.data,data_file_raw=on mixed.raw out
convert -O qcow2 -o data_file=out.data,data_file_raw=on top.q out
convert -O qcow2 -o data_file=out.data odd.raw out
convert -O qcow2 -o preallocation=off mixed.raw out
convert -O qcow2 -o preallocation=metadata mixed.raw out
convert -O qcow2 -o preallocation=metadata odd.raw out
convert -O qcow2 -o preallocation=falloc mixed.raw out
convert -O qcow2 -o preallocation=full mixed.raw out
convert -O qcow2 -o preallocation=metadata,cluster_size=512 sectors.raw out
convert -O qcow2 -o preallocation=metadata,extended_l2=on sectors.raw out
convert -O qcow2 -o preallocation=falloc,data_file=out.data mixed.raw out
convert -O qcow2 -o size=1G mixed.raw out
convert -O qcow2 -o size=1,cluster_size=4k mixed.raw out
convert -o preallocation=falloc mixed.raw out
convert -o preallocation=full mixed.raw out
convert -o preallocation=full top.q out
convert -o preallocation=off mixed.raw out
convert -o nocow=on mixed.raw out
convert -o extent_size_hint=0 mixed.raw out
convert -o size=1 mixed.raw out
"""

COMPRESSED = r"""
convert -c -O qcow2 mixed.raw out
convert -c -O qcow2 sectors.raw out
convert -c -O qcow2 zeros.raw out
convert -c -O qcow2 holes.raw out
convert -c -O qcow2 odd.raw out
convert -c -O qcow2 tiny.raw out
convert -c -O qcow2 empty.raw out
convert -c -O qcow2 big.raw out
convert -c -O qcow2 packed.q out
convert -c -O qcow2 zstd.q out
convert -c -O qcow2 ext.q out
convert -c -O qcow2 top.q out
convert -c -O qcow2 odd.q out
convert -c -O qcow2 odd.raw tiny.raw plain.q out
convert -c -O qcow2 -o compression_type=zlib mixed.raw out
convert -c -O qcow2 -o compression_type=zstd mixed.raw out
convert -c -O qcow2 -o compression_type=zstd,cluster_size=4k sectors.raw out
convert -c -O qcow2 -o cluster_size=512 mixed.raw out
convert -c -O qcow2 -o cluster_size=2M big.raw out
convert -c -O qcow2 -o compat=0.10 mixed.raw out
convert -c -O qcow2 -o extended_l2=on mixed.raw out
convert -c -O qcow2 -o extended_l2=on,compression_type=zstd,cluster_size=16k big.raw out
convert -c -O qcow2 -o refcount_bits=64 mixed.raw out
convert -c -O qcow2 -o preallocation=off mixed.raw out
convert -c -O qcow2 -m 1 big.raw out
convert -c -O qcow2 -m 16 -W big.raw out
convert -c -O qcow2 -S 64k sectors.raw out
"""

BACKING = r"""
## the same data below: what only the top holds is copied
convert -O qcow2 -B base.raw -F raw short.q out
convert -O qcow2 -B base.raw -F raw long.q out
convert -O qcow2 -B mid.q -F qcow2 top.q out
convert -O qcow2 -B base.raw -F raw mid.q out
convert -O qcow2 -B base.raw -F raw ext-over.q out
convert -O qcow2 -B base.raw -F raw c512-over.q out
convert -O qcow2 -B base.raw -F raw c2m-over.q out
convert -O qcow2 -B base.raw -F raw packed-over.q out
convert -O qcow2 -o backing_file=base.raw,backing_fmt=raw short.q out
convert -O qcow2 -B base.raw -o backing_file=x,backing_fmt=raw short.q out
convert -O qcow2 -B base.raw -F raw sub/over.q out
convert -O qcow2 -B ../base.raw -F raw sub/over.q sub/out.q
## clusters of another size
convert -O qcow2 -B base.raw -F raw -o cluster_size=2M short.q out
convert -O qcow2 -B base.raw -F raw -o cluster_size=2M c512-over.q out
convert -O qcow2 -B base.raw -F raw -o cluster_size=256k short.q out
convert -O qcow2 -B base.raw -F raw -o cluster_size=256k c512-over.q out
convert -O qcow2 -B base.raw -F raw -o cluster_size=64k c512-over.q out
convert -O qcow2 -B base.raw -F raw -o cluster_size=4k short.q out
convert -O qcow2 -B base.raw -F raw -o cluster_size=512 ext-over.q out
convert -O qcow2 -B base.raw -F raw -o cluster_size=64k ext-over.q out
convert -O qcow2 -B base.raw -F raw -o cluster_size=1M long.q out
convert -O qcow2 -B mid.q -F qcow2 -o cluster_size=512k top.q out
convert -O qcow2 -B mid.q -F qcow2 -o cluster_size=16k top.q out
convert -O qcow2 -B base.raw -F raw -o extended_l2=on short.q out
convert -O qcow2 -B base.raw -F raw -o extended_l2=on c512-over.q out
convert -O qcow2 -B base.raw -F raw -o extended_l2=on,cluster_size=2M c512-over.q out
convert -O qcow2 -B base.raw -F raw -o extended_l2=on ext-over.q out
convert -O qcow2 -B base.raw -F raw -o extended_l2=on,preallocation=metadata ext-over.q out
convert -O qcow2 -B base.raw -F raw -o data_file=out.data short.q out
## others below, or more of it, or less
convert -O qcow2 -B base.raw -F raw top.q out
convert -O qcow2 -B mixed.raw -F raw top.q out
convert -O qcow2 -B holes.raw -F raw short.q out
convert -O qcow2 -B tiny.raw -F raw short.q out
convert -O qcow2 -B empty.raw -F raw short.q out
convert -O qcow2 -B odd.raw -F raw short.q out
convert -O qcow2 -B odd.raw -F raw -o cluster_size=2M short.q out
convert -O qcow2 -B base.raw -F raw mixed.raw out
convert -O qcow2 -B base.raw -F raw holes.raw out
convert -O qcow2 -B base.raw -F raw zeros.raw out
convert -O qcow2 -B base.raw -F raw odd.raw out
convert -O qcow2 -B base.raw -F raw plain.q out
convert -O qcow2 -B base.raw -F raw odd.q out
convert -O qcow2 -B base.raw -F raw -o cluster_size=2M mixed.raw out
convert -O qcow2 -B base.raw -F raw -o cluster_size=2M sectors.raw out
convert -O qcow2 -B base.raw -F raw -o cluster_size=4k -S 512 sectors.raw out
convert -O qcow2 -B packed.q -F qcow2 sectors.raw out
convert -O qcow2 -B plain.q -F raw short.q out
convert -O qcow2 -B 'json:{"driver":"raw","file":{"driver":"file","filename":"base.raw"}}' -F raw short.q out
## old versions have no zero clusters
convert -O qcow2 -B base.raw -F raw -o compat=0.10 c512-over.q out
convert -O qcow2 -B base.raw -F raw -o compat=0.10,cluster_size=4k short.q out
convert -O qcow2 -B base.raw -F raw -o compat=0.10,cluster_size=2M short.q out
convert -O qcow2 -B base.raw -F raw -o compat=0.10 holes.raw out
## compressed
convert -c -O qcow2 -B base.raw -F raw short.q out
convert -c -O qcow2 -B base.raw -F raw -o cluster_size=256k c512-over.q out
convert -c -O qcow2 -B base.raw -F raw -o cluster_size=2M short.q out
convert -c -O qcow2 -B base.raw -F raw -o cluster_size=4k short.q out
convert -c -O qcow2 -B base.raw -F raw -o compat=0.10 short.q out
convert -c -O qcow2 -B base.raw -F raw -o extended_l2=on c512-over.q out
convert -c -O qcow2 -B mid.q -F qcow2 -o cluster_size=256k top.q out
convert -c -O qcow2 -B base.raw -F raw mixed.raw out
## offload
convert -C -O qcow2 -B base.raw -F raw short.q out
convert -C -O qcow2 -B base.raw -F raw -o cluster_size=256k c512-over.q out
"""

SNAPSHOTS = r"""
convert -l one snaps.q out
convert -l 1 snaps.q out
convert -l 2 snaps.q out
convert -l three snaps.q out
convert -l snapshot.id=1 snaps.q out
convert -l snapshot.name=1 snaps.q out
convert -l snapshot.id=2,snapshot.name=1 snaps.q out
convert -l snapshot.name=one,snapshot.id=1 snaps.q out
convert -l snapshot.id=1,snapshot.id=2 snaps.q out
convert -O qcow2 -l one snaps.q out
convert -c -O qcow2 -l three snaps.q out
convert -S 0 -l one snaps.q out
convert snaps.q out
convert -l snapshot.id=1,snapshot.name=1 snaps.q out
convert -l 4 snaps.q out
convert -l '' snaps.q out
convert -l id=1 snaps.q out
convert -l snapshot.id=9 snaps.q out
convert -l snapshot.name=nosuch snaps.q out
convert -l one plain.q out
convert -l one mixed.raw out
convert -l one snaps.q snaps.q out
convert -f raw -l one snaps.q out
"""

BITMAPS = r"""
convert --bitmaps -O qcow2 marked.q out
convert --bitmaps -O qcow2 -o cluster_size=4k marked.q out
convert --bitmaps -c -O qcow2 marked.q out
convert --bitmaps -O qcow2 -o extended_l2=on,refcount_bits=1 marked.q out
convert --bitmaps -O qcow2 plain.q out
convert --bitmaps --skip-broken-bitmaps -O qcow2 marked.q out
convert --bitmaps --skip-broken-bitmaps -O qcow2 stale.q out
convert --bitmaps -O qcow2 stale.q out
convert --bitmaps -O qcow2 -o compat=0.10 marked.q out
convert --bitmaps -O qcow2 mixed.raw out
convert --bitmaps -O raw marked.q out
convert --bitmaps -O qcow2 v2.q out
convert --bitmaps marked.q marked.q -O qcow2 out
convert --bitmaps -O qcow2 -o data_file=out.data marked.q out
convert --bitmaps -O qcow2 -B base.raw -F raw marked.q out
"""

OPTIONS = r"""
convert -p holes.raw out
convert -p empty.raw out
convert -p -q mixed.raw out
convert -q mixed.raw out
convert -p missing out
convert -p -S 0 tiny.raw out
convert -m 1 big.raw out
convert -m 16 big.raw out
convert -m 3 -W -O qcow2 -o cluster_size=64k mixed.raw out
convert -W -O qcow2 big.raw out
convert -W top.q out
convert -C mixed.raw out
convert -C zeros.raw out
convert -C odd.raw out
convert -C tiny.raw out
convert -C plain.q out
convert -C packed.q out
convert -C top.q out
convert -C big.raw out
convert -C -O qcow2 mixed.raw out
convert -C -O qcow2 zeros.raw out
convert -C -O qcow2 -o cluster_size=4k plain.q out
convert -C -O qcow2 top.q out
convert -C -O qcow2 -o extended_l2=on sectors.raw out
convert -C mixed.raw odd.raw out
convert -r 100M mixed.raw out
convert -r 0 mixed.raw out
convert --salvage mixed.raw out
convert --salvage -O qcow2 packed.q out
convert -t none mixed.raw out
convert -t directsync odd.raw out
convert -t writethrough mixed.raw out
convert -t writeback -O qcow2 mixed.raw out
convert -t none -O qcow2 mixed.raw out
convert -t none -c -O qcow2 plain.q out
convert -T none mixed.raw out
convert -T none -O qcow2 top.q out
convert -T directsync odd.raw out
convert -T unsafe -t unsafe mixed.raw out
convert -T none -t none odd.raw out
convert out mixed.raw -O qcow2 -f
convert -fraw -Oqcow2 mixed.raw out
convert mixed.raw -O qcow2 out -o cluster_size=4k
convert -o cluster_size=4k -o lazy_refcounts=on -O qcow2 mixed.raw out
convert -o cluster_size=4k,cluster_size=64k -O qcow2 mixed.raw out
convert -O qcow2 mixed.raw ''
convert -- mixed.raw -out
convert --object secret,id=s.a,data=x mixed.raw out
"""

EXISTING = r"""
convert -n mixed.raw t-same.raw
convert -n mixed.raw t-big.raw
convert -n holes.raw t-small.raw
convert -n mixed.raw t-small.raw
convert -n odd.raw t-odd.raw
convert -n odd.raw t-same.raw
convert -n tiny.raw t-same.raw
convert -n empty.raw t-same.raw
convert -n sectors.raw t-same.raw
convert -n zeros.raw t-same.raw
convert -n plain.q t-same.raw
convert -n packed.q t-same.raw
convert -n long.q t-same.raw
convert -n snaps.q -l one t-same.raw
convert -n tiny.raw tiny.raw t-same.raw
convert -n -O raw mixed.raw t-same.raw
convert -n -S 0 mixed.raw t-same.raw
convert -n -S 512 sectors.raw t-same.raw
convert -n -S 64k sectors.raw t-same.raw
convert -n -C mixed.raw t-same.raw
convert -n -C sectors.raw t-big.raw
convert -n -m 1 mixed.raw t-same.raw
convert -n -W mixed.raw t-same.raw
convert -n --target-is-zero mixed.raw t-same.raw
convert -n --target-is-zero plain.q t-big.raw
convert -n -t none mixed.raw t-same.raw
convert -n -t none odd.raw t-odd.raw
convert -n -c mixed.raw t-same.raw
convert -n --bitmaps marked.q t-big.raw
convert -n --target-image-opts mixed.raw driver=raw,file.filename=t-same.raw
convert -n --target-image-opts mixed.raw driver=raw,offset=512k,size=1M,file.filename=t-big.raw
convert -n --target-image-opts mixed.raw driver=raw,offset=512,size=512,file.filename=t-big.raw
convert -n --target-image-opts mixed.raw file.filename=t-same.raw
convert -n mixed.raw 'json:{"driver":"raw","file":{"driver":"file","filename":"t-same.raw"}}'
convert -n mixed.raw missing
convert -n -O qcow2 mixed.raw t-same.raw
convert -n -O nosuch mixed.raw t-same.raw
convert -n -B base.raw mixed.raw t-same.raw
convert -n -B base.raw -F raw plain.q t-same.raw
## a file that was there is made anew
convert mixed.raw t-junk
convert -O qcow2 mixed.raw t-junk
convert -O qcow2 mixed.raw t-old.q
convert -O qcow2 -B base.raw -F raw short.q t-old.q
convert mixed.raw t-old.q
convert holes.raw t-big.raw
convert tiny.raw t-big.raw
convert -c -O qcow2 mixed.raw t-big.raw
convert -O qcow2 -B t-old.q -F qcow2 mixed.raw t-old.q
convert -O qcow2 -B base.raw -F raw -o data_file=t-other.data short.q t-old.q
convert -O qcow2 -o data_file=t-other.data mixed.raw out
"""

REFUSED = r"""
convert lost.q out
convert future.q out
convert torn.q out
convert -O qcow2 torn.q out
convert -p torn.q out
convert --salvage torn.q out
convert -n -O qcow2 mixed.raw t-old.q
convert -n -O qcow2 -B base.raw -F raw short.q t-over.q
convert -n --target-image-opts mixed.raw driver=qcow2,file.filename=t-old.q
convert -n --bitmaps -O qcow2 marked.q t-old.q
convert -f qcow2 mixed.raw out
convert -f nosuch mixed.raw out
convert missing out
convert mixed.raw missing out
convert '' out
convert . out
convert sub out
convert mixed.raw sub
convert mixed.raw nodir/out
convert -O qcow2 mixed.raw nodir/out
convert -O qcow2 mixed.raw sub
convert mixed.raw json:{}
convert mixed.raw 'json:{"driver":"raw"}'
convert nosuch:x out
convert mixed.raw nosuch:x
convert mixed.raw mixed.raw
convert -O qcow2 mixed.raw mixed.raw
convert -n mixed.raw mixed.raw
convert plain.q plain.q
convert -O qcow2 plain.q plain.q
convert -O qcow2 top.q mid.q
convert -O qcow2 top.q base.raw
convert top.q base.raw
convert -n top.q base.raw
convert -n -O qcow2 top.q mid.q
convert -U t-old.q t-old.q
convert -U -O qcow2 t-old.q t-old.q
convert -U t-same.raw t-same.raw
convert -U t-same.raw ./t-same.raw
convert -U t-top.q t-under.raw
convert -U -O qcow2 t-top.q t-under.raw
convert -U -O qcow2 -o data_file=t-same.raw t-same.raw out
convert -n -U t-same.raw t-same.raw
convert --image-opts driver=raw,file.filename=t-same.raw,file.locking=off t-same.raw
convert -O qcow2 -B out -F qcow2 mixed.raw out
convert -O qcow2 -B missing -F raw mixed.raw out
convert -O qcow2 -B missing mixed.raw out
convert -O qcow2 -B base.raw -F qcow2 mixed.raw out
convert -O qcow2 -B base.raw -F nosuch mixed.raw out
convert -O qcow2 -B '' -F raw mixed.raw out
convert -O qcow2 -B lost.q -F qcow2 mixed.raw out
convert -O qcow2 -B base.raw -F raw mixed.raw mixed.raw out
convert -O qcow2 -F raw mixed.raw out
convert -O raw -B base.raw -F raw mixed.raw out
convert -B base.raw mixed.raw out
convert -F raw mixed.raw out
convert -c mixed.raw out
convert -c -O qcow2 -o preallocation=metadata mixed.raw out
convert -c -O qcow2 -o preallocation=full mixed.raw out
convert -c -O qcow2 -o data_file=out.data mixed.raw out
convert -O qcow2 -o preallocation=full -B base.raw -F raw mixed.raw out
convert -O qcow2 -o preallocation=foo mixed.raw out
convert -o preallocation=metadata mixed.raw out
convert -o preallocation=foo mixed.raw out
convert -O qcow2 -o cluster_size=1000 mixed.raw out
convert -O qcow2 -o cluster_size=4M mixed.raw out
convert -O qcow2 -o cluster_size=foo mixed.raw out
convert -O qcow2 -o refcount_bits=3 mixed.raw out
convert -O qcow2 -o refcount_bits=128 mixed.raw out
convert -O qcow2 -o compat=0.10,refcount_bits=1 mixed.raw out
convert -O qcow2 -o compat=1.2 mixed.raw out
convert -O qcow2 -o compat=0.10,lazy_refcounts=on mixed.raw out
convert -O qcow2 -o compat=0.10,data_file=out.data mixed.raw out
convert -O qcow2 -o compat=0.10,extended_l2=on mixed.raw out
convert -O qcow2 -o compat=0.10,compression_type=zstd mixed.raw out
convert -O qcow2 -o compression_type=foo mixed.raw out
convert -O qcow2 -o extended_l2=on,cluster_size=4k mixed.raw out
convert -O qcow2 -o data_file_raw=on mixed.raw out
convert -O qcow2 -o data_file=nodir/x mixed.raw out
convert -O qcow2 -o data_file=out,data_file_raw=on mixed.raw out
convert -O qcow2 -o data_file=mixed.raw,data_file_raw=on mixed.raw out
convert -O qcow2 -o bogus=1 mixed.raw out
convert -O qcow2 -o size=foo mixed.raw out
convert -O qcow2 -o lazy_refcounts=maybe mixed.raw out
convert -O qcow2 -o backing_fmt=raw mixed.raw out
convert -O qcow2 -o encryption=on mixed.raw out
convert -O qcow2 -o encrypt.format=luks mixed.raw out
convert -c -O qcow2 -o encrypt.format=luks mixed.raw out
convert -o extent_size_hint=8G mixed.raw out
convert -t none mixed.raw nodir/out
convert mixed.raw /dev/null
convert mixed.raw /dev/full
convert empty.raw /dev/null
convert /dev/null out
convert /dev/zero out
convert -O qcow2 mixed.raw /dev/null
convert -n mixed.raw /dev/null
"""

TABLES = {
    "to raw": TO_RAW,
    "sparse": SPARSE,
    "to qcow2": TO_QCOW2,
    "compressed": COMPRESSED,
    "backing": BACKING,
    "snapshots": SNAPSHOTS,
    "bitmaps": BITMAPS,
    "options": OPTIONS,
    "existing": EXISTING,
    "refused": REFUSED,
}
CASES = [line for table in TABLES.values() for line in lines(table)]
