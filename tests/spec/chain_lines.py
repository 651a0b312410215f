"""Invocations of commit, rebase and `convert -n` on the chains that `test_chain_tables` makes."""

from __future__ import annotations

COMMIT = """
commit
commit top.q mid.q
commit nosuch.q
commit -f nosuch top.q
commit -f raw top.q
commit none.q
commit base.q
commit raw.raw
commit -f raw raw.raw
commit gone.q
commit -b base.q gone.q
commit -b nosuch.q top.q
commit -b '' top.q
commit -b top.q top.q
commit -b ./top.q top.q
commit -b none.q top.q
commit -b base.q none.q
commit -t foo top.q
commit -r foo top.q
commit -z top.q
commit -U top.q
commit --image-opts -f qcow2 driver=qcow2,file.filename=top.q
commit --image-opts driver=qcow2,file.filename=top.q
commit --image-opts driver=qcow2,file.filename=top.q,read-only=on
commit --image-opts driver=qcow2,file.filename=top.q,backing=null
commit top.q
commit -d top.q
commit -q top.q
commit -q -d top.q
commit -p -q top.q
commit -t none top.q
commit -t writethrough top.q
commit -t unsafe top.q
commit -t directsync top.q
commit -r 100M top.q
commit -r 0 -f qcow2 top.q
commit -b mid.q top.q
commit -b ./mid.q top.q
commit -b base.q top.q
commit -b ./base.q top.q
commit -b .//base.q top.q
commit -d -b base.q top.q
commit -b mid.q -b base.q top.q
commit mid.q
commit empty.q
commit -d empty.q
commit deep5.q
commit -b base.q deep5.q
commit -b deep2.q deep5.q
commit -b deep3.q deep4.q
commit -b deep1.q -q deep2.q
commit onshortraw.q
commit -d onshortraw.q
commit -b short.raw onshortraw.q
commit onshort.q
commit -d onshort.q
commit onlong.q
commit -d onlong.q
commit ondip.q
commit -b long.q ondip.q
commit dip.q
commit -q big.q
commit onraw.q
commit -d onraw.q
commit -b raw.raw onraw.q
commit onholes.q
commit -d onholes.q
commit probed.q
commit v2.q
commit v3onv2.q
commit -d v3onv2.q
commit v2dip.q
commit -d v2dip.q
commit ext.q
commit -d ext.q
commit extonbase.q
commit snap.q
commit -d snap.q
commit -b snapbase.q snap.q
commit onzip.q
commit -d onzip.q
commit bits.q
commit ondf.q
commit dfo.q
commit small.q
commit -d small.q
commit large.q
commit onsmall.q
commit onrb1.q
commit onvmdk.q
commit onvdi.q
commit onvpc.q
commit onqcow.q
commit onqed.q
commit growvmdk.q
commit growvdi.q
commit growqcow.q
commit growqed.q
commit -f qed top.qed
commit top.qcow
"""

REBASE = """
rebase
rebase top.q
rebase -b base.q
rebase -b base.q -F qcow2 top.q mid.q
rebase -b base.q -F nosuch top.q
rebase -u -b base.q -F nosuch top.q
rebase -b nosuch.q -F qcow2 top.q
rebase -b base.q -F qcow2 nosuch.q
rebase -f nosuch -b base.q -F qcow2 top.q
rebase -f raw -b base.q -F qcow2 top.q
rebase -f raw -b raw.raw -F raw raw.raw
rebase -b raw.raw -F raw raw.raw
rebase -b base.q -F qcow2 gone.q
rebase -b '' gone.q
rebase -t foo -b base.q -F qcow2 top.q
rebase -T foo -b base.q -F qcow2 top.q
rebase -t foo -T foo -b base.q -F qcow2 top.q
rebase --image-opts -f qcow2 -b base.q -F qcow2 driver=qcow2,file.filename=top.q
rebase -z top.q
rebase -b top.q -F qcow2 top.q
rebase -b top.q -F qcow2 mid.q
rebase -b top.q -F qcow2 base.q
rebase -b raw.raw -F qcow2 top.q
rebase -b gone.q -F qcow2 top.q
rebase -u top.q
rebase -u -F qcow2 top.q
rebase -u -F raw top.q
rebase -u -b '' top.q
rebase -u -b '' -F qcow2 top.q
rebase -u -b nosuch.q -F qcow2 top.q
rebase -u -b raw.raw -F raw top.q
rebase -u -b ./mid.q -F qcow2 top.q
rebase -u -b raw.raw -F raw none.q
rebase -u -b raw.raw -F raw gone.q
rebase -u gone.q
rebase -u none.q
rebase -u -b raw.raw -F raw snap.q
rebase -u -b raw.raw -F raw v2.q
rebase -u v2.q
rebase -u -b raw.raw -F raw dfo.q
rebase -u -b raw.raw -F raw bits.q
rebase -u -p -b raw.raw -F raw top.q
rebase -p -u top.q
rebase -q -u top.q
rebase -b '' top.q
rebase -b '' -F qcow2 top.q
rebase -b '' -F raw onraw.q
rebase -b '' none.q
rebase -b '' empty.q
rebase -b '' onshort.q
rebase -b '' onlong.q
rebase -b '' ondip.q
rebase -b '' v2.q
rebase -b '' v2dip.q
rebase -b '' ext.q
rebase -b '' extonbase.q
rebase -b '' snap.q
rebase -b '' bits.q
rebase -b '' dfo.q
rebase -b '' small.q
rebase -b '' large.q
rebase -b '' onzip.q
rebase -b '' onholes.q
rebase -b '' onvmdk.q
rebase -b '' onvdi.q
rebase -b '' onqcow.q
rebase -b '' deep5.q
rebase -b base.q -F qcow2 top.q
rebase -b ./base.q -F qcow2 top.q
rebase -b mid.q -F qcow2 top.q
rebase -b ./mid.q -F qcow2 top.q
rebase -q -t none -T none -b base.q -F qcow2 top.q
rebase -t directsync -T writethrough -b base.q -F qcow2 top.q
rebase -U -b base.q -F qcow2 top.q
rebase -b base.q -F qcow2 deep5.q
rebase -b deep2.q -F qcow2 deep5.q
rebase -b none.q -F qcow2 top.q
rebase -b raw.raw -F raw top.q
rebase -b short.raw -F raw top.q
rebase -b short.q -F qcow2 top.q
rebase -b long.q -F qcow2 top.q
rebase -b dip.q -F qcow2 top.q
rebase -b snap.q -F qcow2 top.q
rebase -b ext.q -F qcow2 top.q
rebase -b zipbase.q -F qcow2 top.q
rebase -b ondf.q -F qcow2 top.q
rebase -b b.vmdk -F vmdk top.q
rebase -b b.vdi -F vdi top.q
rebase -b b.vpc -F vpc top.q
rebase -b b.qed -F qed top.q
rebase -b b.qcow -F qcow top.q
rebase -b other.raw -F raw onraw.q
rebase -b ./raw.raw -F raw onraw.q
rebase -b raw.raw -F raw onholes.q
rebase -b holes.raw -F raw onraw.q
rebase -b raw.raw -F raw none.q
rebase -b short.q -F qcow2 none.q
rebase -b short.raw -F raw onraw.q
rebase -b raw.raw -F raw onshort.q
rebase -b short.q -F qcow2 onshortraw.q
rebase -b long.q -F qcow2 onshort.q
rebase -b base.q -F qcow2 onlong.q
rebase -b base.q -F qcow2 ondip.q
rebase -b raw.raw -F raw v2.q
rebase -b short.q -F qcow2 v2.q
rebase -b long.q -F qcow2 v2dip.q
rebase -b raw.raw -F raw ext.q
rebase -b raw.raw -F raw extonbase.q
rebase -b extbase.q -F qcow2 extonbase.q
rebase -b base.q -F qcow2 ext.q
rebase -b raw.raw -F raw snap.q
rebase -b raw.raw -F raw bits.q
rebase -b raw.raw -F raw dfo.q
rebase -b raw.raw -F raw small.q
rebase -b raw.raw -F raw large.q
rebase -b long.q -F qcow2 big.q
rebase -b raw.raw -F raw onzip.q
rebase -b base.q -F qcow2 onqed.q
rebase -b raw.raw -F raw probed.q
rebase -f qed -b raw.raw -F raw top.qed
rebase -f qed -b '' top.qed
rebase -f qed -u -b raw.raw -F raw top.qed
rebase -u -b raw.raw -F raw top.qcow
rebase -u -b raw.raw -F raw top.vmdk
rebase -u -b raw.raw -F raw b.vdi
rebase --image-opts -b base.q -F qcow2 driver=qcow2,file.filename=top.q
rebase --image-opts -b base.q -F qcow2 driver=qcow2,file.filename=top.q,read-only=on
"""

CONVERT = """
convert -n -O qcow2 raw.raw nosuch.q
convert -n -O nosuch raw.raw t.q
convert -n -O raw -f nosuch raw.raw t.raw
convert -n -o compat=1.1 -f raw -O qcow2 raw.raw t.q
convert -n -f raw -O qcow2 t.raw
convert --target-is-zero -f raw -O qcow2 raw.raw t.q
convert -n -f raw -O qcow2 raw.raw tless.q
convert -n -f raw -O raw raw.raw tless.raw
convert -n -O qcow2 top.q tless.q
convert -n -O qcow2 t.q t.q
convert -n -O qcow2 top.q base.q
convert -n -O raw onraw.q raw.raw
convert -n -O raw t.raw t.raw
convert -n -O qcow2 top.q mid.q
convert -n -c -O raw top.q t.raw
convert -n -B raw.raw -F raw -O raw onraw.q t.raw
convert -n --target-image-opts -O qcow2 top.q driver=qcow2,file.filename=t.q
convert -n -O qcow2 gone.q t.q
convert -n -O qcow2 top.q gone.q
convert -n -S 1 -O qcow2 top.q t.q
convert -n -O qcow2 top.q t.q
convert -n -O qcow2 top.q tsnap.q
convert -n -O qcow2 top.q tzip.q
convert -n -O qcow2 top.q tover.q
convert -n -O qcow2 top.q tdf.q
convert -n -O qcow2 top.q tdfr.q
convert -n -O qcow2 top.q text.q
convert -n -O qcow2 top.q tbits.q
convert -n -O qcow2 top.q tv2.q
convert -n -O qcow2 top.q tbig.q
convert -n -O qcow2 top.q tempty.q
convert -n -O qcow2 top.q t512.q
convert -n -O raw top.q t.raw
convert -n -O raw top.q tbig.raw
convert -n top.q t.raw
convert -n -c -O qcow2 top.q t.q
convert -n -c -O qcow2 top.q tsnap.q
convert -n -c -O qcow2 top.q tzip.q
convert -n -c -O qcow2 top.q tover.q
convert -n -c -O qcow2 top.q tempty.q
convert -n -c -O qcow2 top.q tbig.q
convert -n -c -O qcow2 top.q text.q
convert -n -c -O qcow2 top.q tv2.q
convert -n -S 0 -O qcow2 top.q t.q
convert -n -S 0 -O qcow2 top.q tsnap.q
convert -n -S 0 -O qcow2 top.q tover.q
convert -n -S 0 -O qcow2 top.q text.q
convert -n -S 0 -O raw top.q t.raw
convert -n -S 64k -O qcow2 top.q t.q
convert -n -S 512 -O qcow2 top.q text.q
convert -n --target-is-zero -O qcow2 top.q tempty.q
convert -n --target-is-zero -O qcow2 top.q t.q
convert -n --target-is-zero -O raw top.q t.raw
convert -n --target-is-zero -O qcow2 top.q tover.q
convert -n -W -O qcow2 top.q t.q
convert -n -W -m 16 -O qcow2 top.q tsnap.q
convert -n -W -c -O qcow2 top.q tempty.q
convert -n -B base.q -F qcow2 -O qcow2 mid.q tempty.q
convert -n -B raw.raw -F raw -O qcow2 onraw.q tover.q
convert -n -B nosuch -O qcow2 onraw.q tover.q
convert -n -f raw -O qcow2 holes.raw t.q
convert -n -f raw -O qcow2 holes.raw tsnap.q
convert -n -f raw -O qcow2 holes.raw tover.q
convert -n -f raw -O qcow2 holes.raw tv2.q
convert -n -f raw -O qcow2 holes.raw text.q
convert -n -f raw -O qcow2 holes.raw tdf.q
convert -n -f raw -O qcow2 holes.raw tzip.q
convert -n -f raw -O raw holes.raw t.raw
convert -n -f raw -O raw short.raw t.raw
convert -n -f raw -O qcow2 short.raw t.q
convert -n -f raw -O qcow2 short.raw tover.q
convert -n -f raw -O qcow2 short.raw tsnap.q
convert -n -f raw -O qcow2 short.raw text.q
convert -n -f raw -S 0 -O qcow2 short.raw tover.q
convert -n -f raw -c -O qcow2 short.raw tsnap.q
convert -n -O qcow2 ext.q text.q
convert -n -O qcow2 short.q tbig.q
convert -n -O qcow2 short.q short.q tbig.q
convert -n -l s -O qcow2 snap.q t.q
convert -n -C -O qcow2 top.q t.q
convert -n -p -q -O qcow2 top.q t.q
convert -n -t none -O qcow2 top.q t.q
convert -n -t writethrough -T none -O qcow2 top.q t.q
convert -n --target-image-opts top.q driver=qcow2,file.filename=t.q
convert -n --target-image-opts top.q driver=raw,file.filename=t.raw,offset=65536
convert -n -O qcow2 top.q onshort.q
convert -n -O qed top.q b.qed
convert -n -O vdi top.q b.vdi
convert -n -O vmdk top.q b.vmdk
convert -n -O qcow top.q b.qcow
"""
