"""Words of many languages that tell how a text is to be read."""

from __future__ import annotations

from gog_edge.indexing.sources.text import SKIPPED_SECTIONS as ENGLISH_SECTIONS


def words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


def phrases(text: str, separator: str = ",") -> frozenset[str]:
    """Return the phrases between separators; a line break is white space."""
    return frozenset(phrase for part in text.split(separator) if (phrase := " ".join(part.split())))


# Titles of sections without citable text, in lower case.
SKIPPED_SECTIONS = ENGLISH_SECTIONS | phrases(
    """
    einzelnachweise; weblinks; literatur; siehe auch; quellen; belege; anmerkungen; fußnoten;
    einzelnachweise und anmerkungen; anmerkungen und einzelnachweise; notes et références; références; notes;
    liens externes; voir aussi; bibliographie; articles connexes; annexes; lien externe; sources; note et référence;
    referencias; enlaces externos; véase también; bibliografía; notas; notas y referencias; fuentes;
    referencias y notas; enlace externo; otros proyectos; referências; ligações externas; ver também; bibliografia;
    notas e referências; leitura adicional; ligação externa; note; collegamenti esterni; voci correlate;
    altri progetti; riferimenti bibliografici; referenties; externe links; externe link; zie ook; literatuur; bronnen;
    bronnen, noten en/of referenties; voetnoten; noten; примечания; ссылки; литература; см. также; источники;
    библиография; сноски; примечания и ссылки; комментарии; примітки; посилання; література; див. також; джерела;
    виноски; зноскі; спасылкі; літаратура; крыніцы; глядзіце таксама; przypisy; linki zewnętrzne; zobacz też; uwagi;
    źródła; reference; externí odkazy; související články; poznámky; literatura; odkazy; referencie; externé odkazy;
    pozri aj; iné projekty; literatúra; zdroje; zunanje povezave; glej tudi; sklici; viri; opombe; referenser;
    externa länkar; se även; källor; noter; fotnoter; litteratur; vidare läsning; referanser; eksterne lenker;
    se også; kilder; eksterne henvisninger; eksterne links; kilder og henvisninger; referencer; lähteet;
    aiheesta muualla; katso myös; viitteet; kirjallisuutta; lähteet ja viitteet; jegyzetek; külső hivatkozások;
    források; lásd még; további információk; irodalom; kapcsolódó szócikkek; kaynakça; dış bağlantılar;
    ayrıca bakınız; notlar; referințe; legături externe; vezi și; bibliografie; lectură suplimentară; παραπομπές;
    εξωτερικοί σύνδεσμοι; βιβλιογραφία; δείτε επίσης; πηγές; σημειώσεις; източници; външни препратки; вижте също;
    бележки; извори; спољашње везе; види још; референце; напомене; библиографија; наводи; надворешни врски; поврзано;
    izvori; vanjske poveznice; vanjske veze; povezano; referencas; ekstera ligiloj; referencoj; eksteraj ligiloj;
    vidu ankaŭ; fontoj; referències; enllaços externs; vegeu també; erreferentziak; kanpo estekak; ikus, gainera;
    ligazóns externas; véxase tamén; viited; välislingid; vaata ka; šaltiniai; nuorodos; atsauces; ārējās saites;
    skatīt arī; referensi; pranala luar; lihat pula; catatan; catatan kaki; daftar pustaka; rujukan; pautan luar;
    lihat juga; tham khảo; liên kết ngoài; xem thêm; chú thích; đọc thêm; 脚注; 注釈; 出典; 外部リンク; 参考文献;
    関連項目; 注釈・出典; 脚注・出典; 関連文献; 関連書籍; 出典・脚注; 参考資料; 註釈; 注; 参照; 参考资料; 參考資料;
    參考文獻; 外部链接; 外部連結; 外部鏈接; 参见; 參見; 参看; 參看; 注释; 註釋; 注釋; 備註; 备注; 延伸阅读; 延伸閱讀;
    来源; 來源; 腳註; 註腳; 参考来源; 參考來源; 相关条目; 相關條目; 각주; 외부 링크; 외부 고리; 같이 보기; 참고 문헌;
    참고문헌; 주석; 출처; 각주 및 참고 문헌; 내용주; 참조주; مراجع; المراجع; وصلات خارجية; روابط خارجية; انظر أيضا;
    انظر أيضًا; انظر ايضا; مصادر; هوامش; المصادر; ملاحظات; قراءات إضافية; پانویس; منابع; پیوند به بیرون;
    جستارهای وابسته; یادداشت‌ها; پیوندهای بیرونی; پانویس‌ها; حوالہ جات; بیرونی روابط; مزید دیکھیے; הערות שוליים;
    קישורים חיצוניים; ראו גם; לקריאה נוספת; ביאורים; מקורות; ביבליוגרפיה; सन्दर्भ; संदर्भ; बाहरी कड़ियाँ; इन्हें भी देखें;
    तथ्यसूत्र; बाह्य दुवे; তথ্যসূত্র; বহিঃসংযোগ; আরও দেখুন; மேற்கோள்கள்; வெளி இணைப்புகள்; மேற்கோள்; మూలాలు; బయటి లింకులు; അവലംബം;
    പുറത്തേക്കുള്ള കണ്ണികൾ; อ้างอิง; แหล่งข้อมูลอื่น; ดูเพิ่ม; เชิงอรรถ; բիբլիոգրաֆիա; ծանոթագրություններ; արտաքին հղումներ;
    տես նաև; სქოლიო; რესურსები ინტერნეტში; იხილეთ აგრეთვე; ლიტერატურა
    """,
    ";",
)
# Abbreviations of three letters and more, after whose full stop a sentence goes on.
ABBREVIATIONS = words(
    """
    mrs prof gen col sgt capt lieut maj adm rev hon gov sen rep pres inc ltd corp bros ave blvd dept univ est approx
    vol vols var subsp spp ssp cf etc jan feb mar apr jun jul aug sep sept oct nov dec tue thu fri hwy mtn cmdr supt
    messrs assn intl eng orig trans illus cca max min avg tel ext sect chap dist mgr msgr bzw usw evtl geb gest inkl
    ggf vgl bzgl sog insb nördl südl östl westl zool abb str nat urspr dtsch griech engl frz ital span chr jhd jhdt
    jahrh tit hrsg verl aufl ags abs mio mrd dipl ing hist mag phil med theol env boul mme mlle édit réf sté hab sig
    sra srta dra pág núm aprox depto prov gral cnel tte avda pag avv ecc dott geom cfr род англ нем фр итал исп греч
    польск яп укр тыс млн млрд руб ул просп пер пос дер обл губ кн изд ред тел стр рис табл гос проф акад доц мин макс
    чел экз букв см др пр гг вв напр устар церк нар син прим тж св пред бывш вкл искл нім рос пол див тис грн вул ст
    tzw tzn inż dyw woj pow płk mjr kpt ppłk zob łac gr niem ang fr ros wł hiszp ur tzv resp angl něm např atd sv
    """
)
# Words that label phonetic signs, and are left out with them.
LABEL_WORDS = words(
    """
    pronounced pronunciation pronunciations pronounce ipa us uk also or and rp ga locally listen audio in english
    commonly usually sometimes stress anglicised anglicized stressed / [ ] aussprache ausgesprochen prononcé prononcée
    prononciation pronunciado pronunciación pronúncia pronuncia uitspraak uttal произносится произношение вимова
    wymowa výslovnost lausutaan 発音 读音 讀音 발음 or: phonetically rhymes with
    """
)
