"""Wrong and odd command lines, by what is wrong with them: the cases of `test_usage_differential`."""

from __future__ import annotations

GLOBAL = r"""
frobnicate
''
creat
inf
INFO
-z
-qx
-Vz
-zV
-Tz
-hV
--bogus
--bogus=1
--ver=1
--help=1
-T
--trace
-T help=1 info
-T '' frobnicate
-T bogus=1 info a.q
-T file=/nonexistent/x info
-T nosuch frobnicate
-T enable=nosuch frobnicate
-T -nosuch frobnicate
-T 'nosuch*' frobnicate
-T events=/nonexistent/x info
-T events=patterns frobnicate
-T events=/dev/null frobnicate
-T nosuch,nosuch2 info
-T nosuch,other frobnicate
-T nosuch -T other frobnicate
-f raw info a.q
-U info a.q
-- frobnicate
--
--trac
-?
-:
-
- info
-é
é
"""

# What every command's parser does; CMD stands for each command in turn.
PARSER = r"""
CMD -z
CMD --bogus
CMD --bogus=1
CMD -zU x
CMD -U
CMD x -zf raw
CMD -f raw -zf
CMD x y z -z
CMD x -f
CMD -f
CMD --object
CMD --obj
CMD --o
CMD --=x
CMD ---
CMD -?
CMD -:
CMD -?x
CMD -é
CMD x -é
CMD --help=1
CMD --object secret x
CMD --object secret,id=1s x
CMD --object secret,id=s x
CMD --object secret,id=s,data=x,file=y x
CMD --object secret,id=s,file=/nonexistent/x x
CMD --object secret,id=s,data=x,bogus=1 x
CMD --object secret,id=s,data=x,format=foo x
CMD --object nosuch,id=s x
CMD --object iothread,id=s x
CMD --object '' x
CMD --object id=s x
CMD --object secret,id=s,data x
CMD --object secret,,id=s x
CMD --object secret,id=s,data.x=5 x
CMD --object secret,id=,data=x x
CMD --object secret,id=s,data=x --object secret,id=s,data=x x
CMD --object secret,id=s,data=x,keyid=k x
CMD --object secret,id=s,data=!!,format=base64 x
CMD --object '{"qom-type":"secret"' x
CMD --object '{}' x
CMD --object '{"qom-type":5}' x
CMD --object '{"qom-type":"secret","id":"s","data":1}' x
CMD --object '{"qom-type":"secret","id":"s","data":"x"}x' x
CMD --object '[1]' x
CMD --object tls-creds-x509,id=t,dir=/nonexistent x
CMD --object tls-creds-x509,id=t x
CMD --object tls-creds-psk,id=t,dir=/nonexistent x
CMD --object authz-simple,id=a x
CMD --object authz-list,id=a,policy=foo x
CMD --object throttle-group,id=m,bogus=5 x
CMD --object tls-cipher-suites,id=t x
CMD --object a.b=1 x
CMD --object secret, x
"""
COMMANDS = ("check", "compare", "convert", "create", "info", "map")

CREATE = r"""
create
create -f raw
create -q
create -f raw -o help=1
create -f raw x 1 2
create -f raw x 1 2 3
create -f raw x foo 2
create -f raw x ''
create -f raw x 1.5
create -f raw x 1.5b
create -f raw x 1e3
create -f raw x 1KiB
create -f raw x 1kB
create -f raw x 1MM
create -f raw x 1,000
create -f raw x 1_000
create -f raw x inf
create -f raw x nan
create -f raw x '1 '
create -f raw x '1k '
create -f raw x 0x
create -f raw x 0xg
create -f raw x k
create -f raw x .
create -f raw x +
create -f raw x ++1
create -f raw x -1
create -f raw x -- -1k
create -f raw x -- -1.5k
create -f raw x 9E
create -f raw x 8E
create -f raw x 16E
create -f raw x 9223372036854775808
create -f raw x 18446744073709551616
create -f raw x 99999999999999999999999
create -o ''
create -o , x 1
create -o ,a=1 x 1
create -o a=1, x 1
create -o a=1,,, x 1
create -o ,,a=1 x 1
create -o a=1 -o '' x 1
create -f nosuch x 1
create -f nosuch -o help
create -f nosuch -o help x
create -f bochs x 1
create -f '' x 1
create -f raw -o bogus=1 x 1
create -f raw -o bogus x 1
create -f raw -o nobogus x 1
create -f raw -o no x 1
create -f raw -o =5 x 1
create -f raw -o helpx x 1
create -f raw -o '?x' x 1
create -f raw -o help=1 x 1
create -f raw -o size=foo x
create -f raw -o size=-1k x
create -f raw -o size=18446744073709551616 x
create -f raw -o size=1M x 1M
create -f raw -o nocow=maybe x 1
create -f raw -o nocow x 1
create -f raw -b a.q x
create -f raw -F raw x 1
create -f qcow2 -o bogus=1 x 1
create -f qcow2 -o a,,b=1 x 1
create -f qcow2 -o lazy_refcounts=maybe x 1
create -f qcow2 -o lazy_refcounts,, x 1
create -f qcow2 -o lazy_refcounts=ON x 1
create -f qcow2 -o refcount_bits=foo x 1
create -f qcow2 -o cluster_size=foo x 1
create -f qcow2 -b '' x 1
create -f qcow2 -b x -F raw x 1
create -f qcow2 -b missing -F raw x 1
create -f qcow2 -b missing -F raw -u x
create -f qcow2 -b a.raw -F qcow2 x
create -f qcow2 -b a.raw -F nosuch x
create -f qcow2 x
create -f qcow2 -F raw x
create -f raw x
create -f qcow2 nosuch:x 1M
create -f qcow2 json:{} 1M
create -f raw '' 1M
create -qb
create -fb
create --image-opts x 1
create -U x 1
"""

INFO = r"""
info
info --output
info --output=foo
info --output=foo a.q
info --output= a.q
info --output foo --output json
info --out=foo a.q
info --output=JSON a.q
info -q a.q
info -p a.q
info --backing-chain=1 a.q
info --force=1 a.q
info --f a.q
info --fo a.q
info --force- missing
info --image-opts -f raw a.q
info --image-opts --format=raw a.q
info missing
info -f raw missing
info -f nosuch a.q
info -f '' a.q
info nosuch:x
info ''
info missing/x
info a.q/x
info .
info -U missing
info --image-opts ''
info --image-opts filename=a.q
info --image-opts driver=nosuch
info --image-opts x
info --image-opts driver=qcow2,bogus=1,file.filename=a.q
info --image-opts file.bogus=1,file.filename=a.q
info json:
info json:{
info json:[1]
info 'json:{}'
info 'json:{"driver":"nosuch"}'
info --backing-chain missing
info -- -f
info -f raw -- --help
info -
"""

CHECK = r"""
check
check -r
check -r foo a.q
check -r Leaks a.q
check -r '' a.q
check -r foo
check --repair=foo a.q
check --output=foo a.q
check --output=foo
check -T foo a.q
check -T '' a.q
check -T None a.q
check -T foo --output=foo a.q
check -T foo --image-opts -f raw a.q
check --image-opts -f raw a.q
check -f nosuch a.q
check missing
check -q missing
check a.raw
check --output=json a.raw
check -q a.raw
check -p a.q
check -U missing
"""

COMPARE = r"""
compare
compare a.q
compare a.q a.q a.q
compare -p a.q
compare -T foo a.q a.q
compare -T foo missing a.q
compare --image-opts -f raw a.q a.q
compare --image-opts -F raw a.q a.q
compare missing a.q
compare a.q missing
compare missing1 missing2
compare -p missing a.q
compare -p -q missing a.q
compare -q missing a.q
compare -p -T foo a.q a.raw
compare -f nosuch a.q a.q
compare -F nosuch a.q a.q
compare --output=json a.q a.q
compare -o x a.q a.q
compare -U missing a.q
compare -s missing a.q
"""

MAP = r"""
map
map --output=foo
map --output=foo a.q
map -s
map -s foo a.q
map -s 1.5 a.q
map --start-offset=foo a.q
map --start=foo a.q
map -l foo a.q
map --max-length=foo a.q
map -s 9E a.q
map -l 9E a.q
map -l -1k a.q
map -s foo -l foo
map --s=foo --m=foo
map --image-opts -f raw a.q
map missing
map --output=json missing
map -f nosuch a.q
map -f qcow2 a.raw
map -q a.q
"""

MEASURE = r"""
measure
measure --output=foo
measure --output=foo a b
measure a b
measure --size 1 a.q
measure --size 1 -f raw
measure --size 1 -l x
measure --size 1 --image-opts
measure -f raw
measure -l x
measure --image-opts
measure --image-opts -f raw a.q
measure --size foo
measure --size ''
measure --size 9E
measure --size -1k
measure --size foo --bogus
measure -O nosuch --size 1
measure -O bochs --size 1
measure -O nosuch missing
measure -O qcow2 -o bogus=1 --size 1
measure -O qcow2 -o help --size 1
measure -O qcow2 -o help
measure -O qcow2 -o '?' --size 1
measure -O qcow2 -o a, --size 1
measure -O qcow2 -o cluster_size=foo --size 1
measure -O qcow2 -o cluster_size=1000 --size 1
measure -O raw -o bogus=1 --size 1
measure -o ''
measure missing
measure -f nosuch a.q
measure -l snapshot.foo=1 a.q
measure -l snapshot.id=1,foo a.q
measure -l snapshot. a.q
measure --object secret a.q
measure --size 1 a b
measure -z
measure --size 1 -zU
measure -f
measure --output
measure --siz
measure --bogus=x
measure --image=1
measure --o=x
measure --=x
measure -q --size 1
"""

CONVERT = r"""
convert
convert a.q
convert -p a.q
convert -m 0 a.q b
convert -m 17 a.q b
convert -m abc a.q b
convert -m 8k a.q b
convert -m '' a.q b
convert -m '8 ' a.q b
convert -m -1 a.q b
convert -m 08 a.q b
convert -m 0x11 a.q b
convert -m 99999999999999999999 a.q b
convert -m 1_6 a.q b
convert -m ' 8' missing b
convert -m +8 missing b
convert -m 0x8 missing b
convert -m 010 missing b
convert -m 0X1 missing b
convert -S foo a.q b
convert -S 1000 a.q b
convert -S 32M a.q b
convert -S 511 a.q b
convert -S 16777217 a.q b
convert -S -1k a.q b
convert -S 9E a.q b
convert -S '' a.q b
convert -S 16M missing b
convert -S 0 missing b
convert -r foo a.q b
convert -r 9E a.q b
convert -r 1M missing b
convert -l snapshot.foo=1 a.q b
convert -l snapshot.id=1,foo a.q b
convert -l snapshot. a.q b
convert -l snapshot.name=x,snapshot.nosuch=5 a.q b
convert -l snapshot.id missing b
convert -l snapshot.noid missing b
convert -o '' a.q b
convert -o a, a.q b
convert --skip-broken-bitmaps a.q b
convert --skip a.q b
convert -C -c a.q b
convert -C -S 4k a.q b
convert -C -S 0 a.q b
convert -C --salvage a.q b
convert --target-image-opts a.q b
convert -n -o x a.q b
convert -n -o help a.q b
convert --target-is-zero a.q b
convert --target a.q b
convert --target-i a.q b
convert -C -c -S 0 --salvage --skip-broken-bitmaps --target-image-opts --target-is-zero -o x
convert -C -c -S 0 --salvage --target-image-opts --target-is-zero -o x
convert -C -S 0 --salvage --target-image-opts --target-is-zero -o x
convert -C --salvage --target-image-opts --target-is-zero -o x
convert --target-image-opts --target-is-zero -o x
convert --target-image-opts --target-is-zero -n -o x
convert --target-is-zero -o help
convert --target-image-opts -n -O raw
convert -T foo
convert -T foo a.q b
convert -T foo missing b
convert -T foo -t foo missing b
convert --image-opts -f raw a.q b
convert -T foo --image-opts -f raw a.q b
convert -t foo --image-opts -f raw a.q b
convert -p --image-opts -f raw a.q b
convert -p -q --image-opts -f raw a.q b
convert missing b
convert -p missing b
convert -q -p missing b
convert a.raw missing b
convert -f nosuch a.q b
convert -f qcow2 a.raw b
convert -O nosuch a.q b
convert -O bochs a.q b
convert -O nosuch missing b
convert -O nosuch -o help
convert -O bochs -o help
convert -O qcow2 -o bogus=1 a.q b
convert -O qcow2 -o bogus=1,help -z
convert -O raw -B a.raw a.q b
convert -O raw -F raw a.q b
convert -O raw -c a.q b
convert -l nosuch a.q b
convert -l nosuch a.raw b
convert -l nosuch a.q a.q b
convert -U missing b
convert -W missing b
convert a.raw nosuch:x
convert a.raw missing/x
convert -n a.raw missing
convert -n -O nosuch a.raw a.q
convert --bitmaps a.q b
convert -u a.q b
convert -t foo missing b
convert -n --target-image-opts -O raw missing b
convert --salvag=1 a.q b
"""


def _lines(table: str) -> list[str]:
    return [line for line in table.splitlines() if line]


CASES = [
    *_lines(GLOBAL),
    *(line.replace("CMD", command) for command in COMMANDS for line in _lines(PARSER)),
    *(line for table in (CREATE, INFO, CHECK, COMPARE, MAP, MEASURE, CONVERT) for line in _lines(table)),
]
